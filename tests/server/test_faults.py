"""What breaks under a server: each fault has one sentence, every request one ending, and no block stays behind."""

from __future__ import annotations

import ctypes
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import slow_down
from server_process import Process

from minfer import AsyncLLM

COMPLETE = "/v1/completions"
LONG: dict[str, Any] = {"max_tokens": 400, "ignore_eos": True}
READY = r"(http://127.0.0.1:\d+)/v1\n"


def endings(client: httpx.Client, count: int) -> tuple[list[threading.Thread], list[str]]:
    """Starts `count` clients, streaming and not; each leaves the code of the one error that it gets."""
    seen: list[str] = []

    def ask(stream: bool) -> None:
        response = httpx.post(f"{client.base_url}{COMPLETE}", json={"prompt": "a", **LONG, "stream": stream}, timeout=60)
        if not stream:
            assert response.status_code == 503
            seen.append(response.json()["error"]["code"])
            return
        events = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
        errors = [json.loads(event)["error"] for event in events if '"error"' in event]
        assert "[DONE]" not in events
        assert len(errors) == 1 and '"error"' in events[-1], "exactly one terminal event, the last"
        seen.append(errors[0]["code"])

    threads = [threading.Thread(target=ask, args=(index % 2 == 0,)) for index in range(count)]
    for thread in threads:
        thread.start()
    return threads, seen


def wait_for_requests(llm: AsyncLLM, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(llm.engine.outputs) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **more: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("the kernel failed"), "RuntimeError: the kernel failed"),
        (MemoryError(), "there was no memory left"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"),
            "lower --max-num-batched-tokens",
        ),
    ],
    ids=["error", "no memory", "no memory in torch"],
)
def test_the_model_fails_in_the_middle(serve: Any, own_llm: AsyncLLM, error: Exception, said: str) -> None:
    slow_down(own_llm, 0.01)
    with serve(own_llm) as client:
        clients, seen = endings(client, 6)
        wait_for_requests(own_llm, 6)
        own_llm.engine.core.runner.logits = raising(error)  # type: ignore[method-assign]
        for thread in clients:
            thread.join(20)
        assert seen == ["engine_dead"] * 6
        later = client.get("/health")
        assert later.status_code == 503
        assert said in later.json()["error"]["message"]
        assert client.post(COMPLETE, json={"prompt": "a"}).status_code == 503
    own_llm.engine.core.scheduler.check_integrity()
    assert own_llm.engine.core.scheduler.pool.num_used == 0


def test_the_engines_thread_is_killed(serve: Any, own_llm: AsyncLLM) -> None:
    """SystemExit ends a thread without a word; whoever waits for it must hear all the same."""
    slow_down(own_llm, 0.01)
    with serve(own_llm) as client:
        clients, seen = endings(client, 3)
        wait_for_requests(own_llm, 3)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(own_llm._thread.ident or 0), ctypes.py_object(SystemExit))
        for thread in clients:
            thread.join(20)
        assert seen == ["engine_dead"] * 3
        assert client.get("/health").status_code == 503
    assert own_llm.engine.core.scheduler.pool.num_used == 0


def test_a_request_that_finds_a_bug_is_the_only_one_to_fail(serve: Any, own_llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down(own_llm, 0.01)
    with serve(own_llm) as client:
        good: list[httpx.Response] = []
        worker = threading.Thread(
            target=lambda: good.append(client.post(COMPLETE, json={"prompt": "a", "max_tokens": 60, "ignore_eos": True}))
        )
        worker.start()
        wait_for_requests(own_llm, 1)
        with monkeypatch.context() as patch:
            patch.setattr(own_llm.engine.inputs, "requests", raising(KeyError("a bug")))
            bad = client.post(COMPLETE, json={"prompt": "b", "max_tokens": 2})
        assert (bad.status_code, bad.json()["error"]["code"]) == (500, "internal_error")
        worker.join(20)
        assert good[0].status_code == 200
        assert client.get("/health").status_code == 200


def test_the_watchdog(start: Callable[..., Process], tiny_llama: Path) -> None:
    """A step that never ends: an error for whoever waits, an honest health, and an exit that a supervisor sees."""
    server = start(tiny_llama, fault="def fault(engine): time.sleep(3600)", watchdog_seconds=0.5)
    url = server.wait_for(READY)
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    stream = httpx.post(url + COMPLETE, json={"prompt": "a", **LONG, "stream": True}, timeout=30)
    assert stream.status_code == 503, "nothing had been sent, so it could still be a status"
    assert "a step of the engine has not ended for" in stream.json()["error"]["message"]
    health = httpx.get(f"{url}/health", timeout=30)
    assert health.status_code == 503
    assert "--watchdog-seconds" in health.json()["error"]["message"]
    assert "a step of the engine has not ended" in server.failure
    assert server.process.returncode == 3


def test_idle_is_not_stalled(start: Callable[..., Process], tiny_llama: Path) -> None:
    server = start(tiny_llama, step_seconds=0.05, watchdog_seconds=0.4)
    url = server.wait_for(READY)
    for _ in range(2):
        assert httpx.post(url + COMPLETE, json={"prompt": "a", "max_tokens": 20, "ignore_eos": True}, timeout=30).status_code == 200
        time.sleep(0.8)
        assert httpx.get(f"{url}/health").json()["step_seconds"] == 0
    assert server.end() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_disk_is_full_while_the_log_is_written(start: Callable[..., Process], tiny_llama: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start(tiny_llama, port=port, stderr="/dev/full")
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                break
        except httpx.ConnectError:
            assert server.process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for _ in range(3):
        assert httpx.post(url + COMPLETE, json={"prompt": "a", "max_tokens": 4}, timeout=30).status_code == 200
    assert server.end() == 0


@pytest.mark.parametrize("damage", ["cut", "garbage", "header"])
def test_a_model_file_that_is_damaged(start: Callable[..., Process], tiny_llama: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "garbage": b"\xff" * 4096, "header": b"\xff" * 8 + content[8:]}[damage])
    server = start(folder)
    assert "model.safetensors" in server.failure
    assert server.process.returncode == 3
    assert "Traceback" not in server.log


def test_no_memory_for_the_kv_cache(start: Callable[..., Process], tiny_llama: Path) -> None:
    server = start(tiny_llama, fault="import minfer.runner.memory as m; m.available_memory = lambda device: 1000")
    assert "kv_cache_memory asks for" in server.failure
    assert server.process.returncode == 3
