"""`GET /v1/engine/state`: the live view's numbers, asked for several times a second by every page that is open.

However many look, the engine's thread makes at most ten snapshots a second: who asks sooner gets the last one, and who asks while one
is being made waits for that. What a watcher has seen already (`since`, the number of the last step it knows) is left out here, on
the event loop, so that one snapshot serves all.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import FastAPI, Query
from starlette.responses import JSONResponse, Response

from minfer.engine.async_llm import AsyncLLM
from minfer.engine.live import LiveView
from minfer.server.slot import ModelSlot

FRESH_SECONDS = 0.1


class Snapshots:
    """The latest snapshot, and the one that is being made, if any. Touched by the event loop only."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self._view = LiveView(llm.engine)
        self._made: asyncio.Task[dict[str, Any]] | None = None
        self._made_at = 0.0

    async def latest(self) -> dict[str, Any]:
        """At most `FRESH_SECONDS` old, or as old as the step that the engine is in. Raises EngineDeadError."""
        if self._made is None or (self._made.done() and time.monotonic() - self._made_at > FRESH_SECONDS):
            self._made = asyncio.create_task(self._make())
        return await asyncio.shield(self._made)  # one caller who leaves must not take it from the others

    async def _make(self) -> dict[str, Any]:
        try:
            return await self._llm.inspect(lambda engine: self._view.snapshot())
        finally:
            self._made_at = time.monotonic()


def add_live_view(app: FastAPI, slot: ModelSlot) -> None:
    snapshots: Snapshots | None = None

    @app.get("/v1/engine/state")
    async def engine_state(since: Annotated[int, Query(ge=0)] = 0) -> Response:
        """What the engine is doing: blocks, requests, the steps after number `since`. Numbers only, never text."""
        nonlocal snapshots
        llm = slot.require()
        if snapshots is None:
            snapshots = Snapshots(llm)
        state = await snapshots.latest()
        return JSONResponse({**state, "steps": [step for step in state["steps"] if step["step"] > since]})
