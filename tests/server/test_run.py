"""The server as a process: 503 while it loads, one-sentence failures, SIGTERM under load, idle without work."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

COMPLETE = "/v1/completions"
PROGRAM = """
import logging, sys, time
from minfer.config import EngineConfig
from minfer.errors import MinferError
from minfer.server import ServerOptions, serve
from minfer.engine.engine import Engine
from minfer.engine.async_llm import AsyncLLM

model, load_seconds, step_seconds, options = sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), eval(sys.argv[4])
from_config, step = Engine.from_config, Engine.step
def slow_load(config, on_phase):
    on_phase("read weights")
    time.sleep(load_seconds)
    return from_config(config, on_phase)
def slow_step(self):
    time.sleep(step_seconds)
    if len(sys.argv) > 5:
        self.core.step = None
    return step(self)
Engine.from_config, Engine.step = slow_load, slow_step
logging.basicConfig(level=logging.INFO)
try:
    serve(EngineConfig(model=model, dtype="float32", device="cpu", threads=1, kv_cache_memory=1 << 20), ServerOptions(**options))
except MinferError as error:
    print("FAILED", error, file=sys.stderr)
    sys.exit(3)
"""


class Process:
    def __init__(self, model: Path | str, load_seconds: float = 0, step_seconds: float = 0, broken: bool = False, **options: Any) -> None:
        options = {"port": 0, "served_model_name": "tiny", **options}
        self.lines: list[str] = []
        arguments = [str(model), str(load_seconds), str(step_seconds), repr(options), *(["broken"] if broken else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while True:
            match = re.search(pattern, self.log)
            if match:
                return match[match.lastindex or 0]
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.log}"
            assert self.process.poll() is None or self.reader.is_alive(), self.log
            time.sleep(0.02)

    def end(self, signal_number: int = signal.SIGTERM, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        code = self.process.wait(seconds)
        self.reader.join(5)
        return code


@pytest.fixture
def start() -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def run(*arguments: Any, **options: Any) -> Process:
        started.append(Process(*arguments, **options))
        return started[-1]

    yield run
    for process in started:
        process.process.kill()
        process.process.wait()


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
    time.sleep(0.5)
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
    time.sleep(0.6)
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
    assert server.end(seconds=10) == 0, server.log


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
    server = start(tiny_llama, broken=True)
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
