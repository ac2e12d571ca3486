"""Starting a real server on a free loopback port, and talking to it through sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from minfer import AsyncLLM, EngineConfig
from minfer.engine.engine import Engine
from minfer.server import ServerOptions
from minfer.server.app import create_app
from minfer.server.slot import ModelSlot
from minfer.server.sockets import protocol

NAME = "tiny"


def load(folder: Path, **settings: Any) -> AsyncLLM:
    values = {"dtype": "float32", "device": "cpu", "threads": 1, "kv_cache_memory": 4 << 20, **settings}
    return AsyncLLM(Engine.from_config(EngineConfig(model=str(folder), **values)))


@contextmanager
def running(model: AsyncLLM | ModelSlot, **options: Any) -> Iterator[httpx.Client]:
    """A client of a server that runs in a thread of this process."""
    settings = ServerOptions(port=0, **{"served_model_name": NAME, **options})
    slot = model if isinstance(model, ModelSlot) else ModelSlot(model.config.model, settings, model)
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(slot, settings)
    config = uvicorn.Config(app, http=protocol(settings), log_config=None, lifespan="off", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive(), "the server did not stop"
    assert not slot.running, "requests that ended are still on the list"
    assert app.state.admission.in_flight == 0, "requests that ended still hold places in the queue"


def wait_until_free(llm: AsyncLLM, seconds: float = 5.0) -> None:
    engine, deadline = llm.engine, time.monotonic() + seconds
    while engine.core.scheduler.pool.num_used or engine.has_unfinished_requests:
        assert time.monotonic() < deadline, f"{engine.core.scheduler.pool.num_used} blocks are still held"
        time.sleep(0.01)


def slow_down(llm: AsyncLLM, seconds: float) -> None:
    """Makes every step take at least so long."""
    step = llm.engine.step

    def slow() -> Any:
        time.sleep(seconds)
        return step()

    llm.engine.step = slow  # type: ignore[method-assign]


def post(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def chunks(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The stream's events, which must end with [DONE]."""
    response = client.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [part for part in response.text.split("\n\n") if part and not part.startswith(":")]
    assert events[-1] == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in events[:-1]]


def streamed_text(parts: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for part in parts for choice in part["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)
