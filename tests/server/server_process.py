"""A server as a process of its own, which tests may break, stall, starve and signal.

`fault` is a line of Python that runs in it once the classes are there, before anything is loaded.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

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
    fault(self)
    return step(self)
def fault(engine):
    pass
exec(sys.argv[5])
Engine.from_config, Engine.step = slow_load, slow_step
logging.basicConfig(level=logging.INFO)
try:
    serve(EngineConfig(model=model, dtype="float32", device="cpu", threads=1, kv_cache_memory=1 << 20), ServerOptions(**options))
except MinferError as error:
    print("FAILED", error, file=sys.stderr)
    sys.exit(3)
"""


class Process:
    def __init__(
        self,
        model: Path | str,
        load_seconds: float = 0,
        step_seconds: float = 0,
        fault: str = "",
        stderr: str | None = None,
        **options: Any,
    ) -> None:
        """`stderr`: a file that takes what the server says, instead of `log`."""
        options = {"port": 0, "served_model_name": "tiny", **options}
        self.lines: list[str] = []
        arguments = [str(model), str(load_seconds), str(step_seconds), repr(options), fault]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with open(stderr, "w") if stderr is not None else contextlib.nullcontext(subprocess.PIPE) as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments], stderr=errors, stdout=subprocess.DEVNULL, text=True, env=environment
            )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
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

    @property
    def failure(self) -> str:
        """The one sentence with which the server ended, after it did."""
        self.process.wait(60)
        self.reader.join(5)
        (line,) = [line for line in self.lines if line.startswith("FAILED")]
        return line.removeprefix("FAILED ").strip()

    def end(self, signal_number: int = signal.SIGTERM, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        code = self.process.wait(seconds)
        self.reader.join(5)
        return code
