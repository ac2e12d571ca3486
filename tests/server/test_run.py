"""The server as a process: 503 while it loads, one-sentence failures, SIGTERM under load, idle without work."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from server_process import Process

COMPLETE = "/v1/completions"


def wait_for_running(url: str, count: int) -> None:
    deadline = time.monotonic() + 30
    while httpx.get(f"{url}/health").json()["running"] < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_loading_serving_draining(start: Callable[..., Process], tiny_llama: Path) -> None:
    server = start(tiny_llama, load_seconds=2, step_seconds=0.02)
    url = server.wait_for(r"(http://127.0.0.1:\d+) answers 503")
    # uvicorn begins to accept a moment after the address is printed; until then connections wait in the socket's queue.
    loading = httpx.get(f"{url}/health", timeout=30)
    assert loading.status_code == 503
    assert loading.headers["retry-after"] == "1"
    assert loading.json()["error"]["code"] == "model_loading"
    assert httpx.post(url + COMPLETE, json={"prompt": "a"}).status_code == 503

    screen = server.wait_for(r"(?s)(minfer serves tiny.*?try it.*?\n)")
    for expected in (f"{url}/v1", "512 tokens", "requests of full length fit", "curl", "read weights", "API key   none"):
        assert expected in screen, screen
    assert httpx.get(f"{url}/health").status_code == 200

    answers: list[httpx.Response] = []

    def ask(stream: bool) -> None:
        body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": stream}
        answers.append(httpx.post(url + COMPLETE, json=body, timeout=60))

    clients = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False, True)]
    for client in clients:
        client.start()
    wait_for_running(url, 3)
    assert server.end() == 0, server.log
    for client in clients:
        client.join()
    assert [answer.status_code for answer in answers] == [200] * 3
    assert sum("data: [DONE]" in answer.text for answer in answers) == 2, "what ran when the signal came ran to its end"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_draining_has_a_limit(start: Callable[..., Process], tiny_llama: Path) -> None:
    """Whoever is still running is told, whole and streamed, and the exit code is 0 all the same."""
    server = start(tiny_llama, step_seconds=0.1, drain_seconds=0.5)
    url = server.wait_for(r"(http://127.0.0.1:\d+)/v1\n")
    answers: dict[bool, httpx.Response] = {}

    def ask(stream: bool) -> None:
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": stream}
        answers[stream] = httpx.post(url + COMPLETE, json=body, timeout=60)

    clients = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for client in clients:
        client.start()
    wait_for_running(url, 2)
    started = time.monotonic()
    assert server.end(signal.SIGINT) == 0, server.log
    assert time.monotonic() - started < 15
    for client in clients:
        client.join()
    assert answers[False].status_code == 503
    assert answers[False].json()["error"]["code"] == "shutting_down"
    assert '"code": "shutting_down"' in answers[True].text or '"code":"shutting_down"' in answers[True].text
    assert "[DONE]" not in answers[True].text


def test_a_signal_while_loading(start: Callable[..., Process], tiny_llama: Path) -> None:
    server = start(tiny_llama, load_seconds=60)
    server.wait_for("answers 503")
    assert server.end() == 0, server.log


def test_a_model_that_can_not_be_loaded(start: Callable[..., Process], tmp_path: Path) -> None:
    server = start(tmp_path / "nowhere")
    server.process.wait(60)
    server.reader.join(5)
    assert server.process.returncode == 3
    failure = [line for line in server.lines if line.startswith("FAILED")]
    assert len(failure) == 1
    assert "nowhere" in failure[0]
    assert "Traceback" not in server.log


def test_an_engine_that_dies_takes_the_server_with_it(start: Callable[..., Process], tiny_llama: Path) -> None:
    server = start(tiny_llama, fault="def fault(engine): engine.core.step = None")
    url = server.wait_for(r"(http://127.0.0.1:\d+)/v1\n")
    assert httpx.post(url + COMPLETE, json={"prompt": "a"}, timeout=30).status_code == 503
    assert httpx.get(f"{url}/health").json()["error"]["code"] == "engine_dead"
    assert server.process.wait(30) == 3, "for a supervisor to see"


def test_a_port_in_use(start: Callable[..., Process], tiny_llama: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start(tiny_llama, port=port)
        server.process.wait(60)
        server.reader.join(5)
    assert server.process.returncode == 3
    assert f"port {port} on 127.0.0.1 is in use" in server.log


def test_an_idle_server_uses_no_cpu(start: Callable[..., Process], tiny_llama: Path) -> None:
    server = start(tiny_llama)
    url = server.wait_for(r"(http://127.0.0.1:\d+)/v1\n")
    assert httpx.post(url + COMPLETE, json={"prompt": "a", "max_tokens": 2}, timeout=30).status_code == 200
    time.sleep(0.3)

    def used() -> float:
        fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    before = used()
    time.sleep(4)
    assert used() - before <= 0.08, "2% of a core"
