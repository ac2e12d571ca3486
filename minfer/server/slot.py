"""`ModelSlot`: where the served model is, or will be.

The port opens before the model is loaded, so that a probe or a user meets "loading, 12 s so far" and not a refused
connection. Routes ask the slot for the engine at each request; until there is one, the slot's answer is a 503.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from minfer.engine.async_llm import AsyncLLM
from minfer.errors import EngineDeadError
from minfer.server.errors import ApiError
from minfer.server.options import ServerOptions

logger = logging.getLogger("minfer.server")


class ModelSlot:
    """Filled once, by the thread that loads; read by the event loop."""

    def __init__(self, model: str, options: ServerOptions, llm: AsyncLLM | None = None) -> None:
        self.root = model
        self.name = options.served_model_name or model
        self.any_name = options.any_model_name
        self.phase = "loading the model"
        self.created = int(time.time())
        self.running: set[str] = set()  # the engine's ids of the requests in flight, for the end of draining
        self.error: Exception | None = None
        self._llm = llm
        self._stall_seconds = options.watchdog_seconds
        self._started = time.monotonic()

    def enter_phase(self, name: str) -> None:
        """What the loading thread is at, for those who ask meanwhile."""
        self.phase = f"loading the model ({name})"

    @property
    def llm(self) -> AsyncLLM | None:
        return self._llm

    def fill(self, llm: AsyncLLM) -> None:
        self._llm = llm

    def fail(self, error: Exception) -> None:
        self.error = error

    def require(self) -> AsyncLLM:
        """The engine, if it can take requests; else raises the 503 that says why not."""
        if self._llm is None:
            seconds = time.monotonic() - self._started
            message = f"the server is {self.phase}, {seconds:.0f} s so far; try again shortly"
            raise ApiError(503, message, code="model_loading", headers={"retry-after": "1"})
        if not self._llm.is_running:
            why = f" ({self._llm.end})" if self._llm.end is not None else ""
            raise ApiError(503, f"the engine is not running any more{why}; restart the server", code="engine_dead")
        return self._llm

    @property
    def stalled(self) -> str | None:
        """What to say of an engine that has been in one step for longer than any step may take; None while it gets on."""
        seconds = 0.0 if self._llm is None else self._llm.busy_seconds
        if not self._stall_seconds or seconds <= self._stall_seconds:
            return None
        return f"a step of the engine has not ended for {seconds:.0f} s (the limit is --watchdog-seconds {self._stall_seconds:g})"

    def health(self) -> dict[str, Any]:
        """Facts about an engine that works; raises the 503 of one that doesn't."""
        llm = self.require()
        if self.stalled is not None:
            raise ApiError(503, self.stalled, code="engine_stalled")
        scheduler = llm.engine.core.scheduler
        return {
            "status": "ok",
            "model": self.name,
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "step_seconds": round(llm.busy_seconds, 3),  # 0: idle
            "running": len(scheduler.running),
            "waiting": scheduler.num_waiting,
        }

    @property
    def adapters(self) -> Mapping[str, str]:
        """The LoRA adapters' names, and where they were read from."""
        return {} if self._llm is None else self._llm.config.lora or {}

    def adapter_of(self, name: str | None) -> str | None:
        """The LoRA adapter that a request asks for by calling it its model; None for the model as it is.

        A request may leave the model out; one that names another model is told so (404), rather than answered by this one.
        """
        if name is None or name == self.name:
            return None
        if name in self.adapters:
            return name
        if self.any_name:
            return None
        shown = name if len(name) <= 100 else name[:97] + "..."
        known = ", ".join(map(repr, (self.name, *self.adapters)))
        raise ApiError(404, f"the model {shown!r} does not exist; this server has {known}", param="model", code="model_not_found")

    async def abort_all(self) -> None:
        """Ends what is in flight; its readers get the end of it."""
        if self._llm is None:
            return
        try:
            for request_id in list(self.running):
                await self._llm.abort(request_id)
        except EngineDeadError:
            logger.info("nothing to abort: the engine is gone, and has told its readers")
