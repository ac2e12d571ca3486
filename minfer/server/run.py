"""`run_server`: the process around the application.

    bind ── accept (503: loading) ── load in a thread ── serve ── signal ── stop accepting, drain ── exit 0

The port is bound first, so that a wrong address costs no loading time. On SIGTERM or SIGINT running requests may finish
for `drain_seconds`; then they are ended with an error that says why. A second Ctrl-C doesn't wait. If the engine dies, or
doesn't come back from a step for `watchdog_seconds`, the server goes too, with an error: a supervisor can restart a process
that is gone, not one that answers 503 for ever.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import uvicorn

from minfer.config import EngineConfig
from minfer.engine.async_llm import AsyncLLM
from minfer.engine.engine import Engine
from minfer.errors import ConfigError, EngineDeadError, ModelLoadError, RequestError
from minfer.sampling_params import SamplingParams
from minfer.server.app import create_app
from minfer.server.job import sampling_defaults
from minfer.server.keys import ApiKeys, load_keys
from minfer.server.log import log_format
from minfer.server.options import ServerOptions
from minfer.server.records import Listener
from minfer.server.registry import announce, withdraw
from minfer.server.slot import ModelSlot
from minfer.server.sockets import bind, protocol, tls_settings
from minfer.server.startup import base_url, exposure_warning, facts, first_screen
from minfer.server.tracing import request_spans

logger = logging.getLogger("minfer.server")

KEEP_ALIVE_SECONDS = 75  # longer than clients keep idle connections, so that they don't write into one that is closing
WATCH_SECONDS = 0.1
LAST_WORDS_SECONDS = 5.0  # for errors to reach clients, after draining or after the engine's death


def run_server(config: EngineConfig, options: ServerOptions) -> None:
    """See `minfer.server.serve`."""
    with log_format(options.log_format), request_spans(options.otlp_traces_endpoint, options.served_model_name or config.model) as spans:
        _run(config, options, spans)


def _run(config: EngineConfig, options: ServerOptions, listeners: Sequence[Listener]) -> None:
    slot = ModelSlot(config.model, options)
    if slot.name in config.adapters:
        raise ConfigError(f"the LoRA adapter {slot.name!r} has the model's own name; give one of them another")
    keys = load_keys(options)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(slot, options, keys, listeners),
            **tls_settings(options),
            http=protocol(options),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(options.drain_seconds + LAST_WORDS_SECONDS) + 1,
        )
    )
    with _signals_end(server), bind(options) as listener:
        port = listener.getsockname()[1]
        _say(f"minfer: loading {config.model}; {base_url(options, port)} answers 503 until it is ready")
        warning = exposure_warning(options, keys)
        if warning:
            _say(warning)
        # A daemon: a signal while it loads must not wait for it.
        threading.Thread(target=_load, args=(slot, config, options), name="minfer-load", daemon=True).start()
        asyncio.run(_serve(server, listener, slot, options, keys, port))
    withdraw()
    if slot.llm is not None:
        slot.llm.shutdown((options.watchdog_seconds or None) if slot.error is None else LAST_WORDS_SECONDS)
    if slot.error is not None:
        raise slot.error


def _load(slot: ModelSlot, config: EngineConfig, options: ServerOptions) -> None:
    try:
        engine = Engine.from_config(config, slot.enter_phase)
        _check_sampling_defaults(engine, options)
        slot.fill(AsyncLLM(engine))
        # What is here now stays. A full collection that looked through all of it would stop every stream for 0.1 s, again and again.
        gc.collect()
        gc.freeze()
    except Exception as error:
        slot.fail(error)


def _check_sampling_defaults(engine: Engine, options: ServerOptions) -> None:
    """Now, rather than as a refusal of requests that never mentioned them."""
    try:
        SamplingParams.from_mapping(sampling_defaults(engine.model_config, options))
    except RequestError as error:
        raise ModelLoadError(f"the checkpoint's generation_config.json: {error}; mend it, or add --generation-config none") from error


async def _serve(server: Any, listener: socket.socket, slot: ModelSlot, options: ServerOptions, keys: ApiKeys, port: int) -> None:
    watch = asyncio.create_task(_watch(server, slot, options, keys, port))
    await server.serve(sockets=[listener])
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)


async def _watch(server: Any, slot: ModelSlot, options: ServerOptions, keys: ApiKeys, port: int) -> None:
    """Announces the model when it is there, ends the server when that failed or the engine died, and limits the draining."""
    announced = False
    while not server.should_exit:
        llm = slot.llm
        if slot.error is not None:
            server.should_exit = True
        elif llm is not None and not announced:
            announced = True
            _say(first_screen(slot, llm, options, keys, port))
            announce(facts(slot, llm, options, port))
        elif llm is not None and not llm.is_running:
            slot.fail(EngineDeadError(f"the engine stopped after an error, so the server stops too: {llm.end}"))
            await asyncio.sleep(LAST_WORDS_SECONDS)
            server.should_exit = True
        elif llm is not None and slot.stalled is not None:
            llm.abandon(slot.stalled)
        await asyncio.sleep(WATCH_SECONDS)
    if slot.running:
        logger.info("draining: %d requests have %g s to finish", len(slot.running), options.drain_seconds)
    deadline = time.monotonic() + options.drain_seconds
    while time.monotonic() < deadline:
        await asyncio.sleep(WATCH_SECONDS)
    while True:  # also those that were only being tokenised at the deadline
        await slot.abort_all()
        await asyncio.sleep(WATCH_SECONDS)


@contextmanager
def _signals_end(server: Any) -> Iterator[None]:
    """uvicorn handles signals while it serves, and raises them again afterwards. Python's own handlers would then end the
    process as killed, not as done; with these, a signal at any moment means: stop serving."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """To stderr: stdout belongs to whoever pipes it. A disk that is full, or a terminal that is gone, is no reason not to serve."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)
