"""The README's commands are run, so that they can't rot."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
SHELL = [[line for line in text.splitlines() if line.strip()] for kind, text in BLOCKS if kind == "sh"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
# `make demo` and `make test` are what CI and a reader run; running the tests from a test would never end.
COMMANDS = [line.split("  #")[0].strip() for block in SHELL for line in block if not line.startswith("make ")]


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_the_first_two_commands_are_the_two_that_matter() -> None:
    assert [line.split("  #")[0].strip() for line in SHELL[0]] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(("minfer serve", "curl"))])
def test_command(command: str) -> None:
    stdin = "/set max_tokens 16\nHi\n/exit\n" if command.startswith("minfer chat") else ""
    done = subprocess.run(shlex.split(command), input=stdin, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("code", PYTHON)
def test_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 40


def test_serve_and_curl() -> None:
    (serve,) = [c for c in COMMANDS if c.startswith("minfer serve")]
    requests = [c for c in COMMANDS if c.startswith("curl")]
    assert requests
    port = re.search(r"--port (\d+)", serve)
    assert port is not None
    server = subprocess.Popen(shlex.split(serve), env=environment(), cwd=ROOT)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port[1]}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        for request in requests:
            done = subprocess.run(shlex.split(request), capture_output=True, text=True, check=True)
            assert '"assistant"' in done.stdout
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0
