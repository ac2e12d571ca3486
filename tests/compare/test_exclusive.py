"""Two runs never overlap, and a worker never outlives its run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compare.errors import CompareError
from compare.exclusive import alone, orphans
from compare.process import ROOT, EngineProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and parent-death signals are Linux's")

HOLD = """
import pathlib, sys, time
from compare.exclusive import alone
with alone(print, pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
LEAVE_A_WORKER = """
import os, pathlib, sys
from compare.process import EngineProcess
from compare.protocol import LoadOptions
process = EngineProcess("tests.compare.fake_engine", pathlib.Path(sys.executable), pathlib.Path(sys.argv[1]))
process.load(pathlib.Path("."), LoadOptions("bf16", "cpu", 1, 64, 1), 30)  # it has asked to die with us by then
process.pause()
print(process._process.pid, flush=True)
os._exit(1)
"""


def gone(pid: int, within: float = 10.0) -> bool:
    """Whether a process ends (a zombie that nobody has waited for counts as ended)."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_second_run_is_refused_with_the_number_of_the_first(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, cwd=ROOT) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(CompareError, match=f"process {first.pid}"), alone(print, lock):
            pass
        first.kill()
    with alone(print, lock):  # a lock dies with its holder
        assert lock.read_text() == str(os.getpid())


def test_a_paused_worker_dies_with_its_parent(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVE_A_WORKER, str(tmp_path / "log")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert gone(int(done.stdout)), "a stopped worker was left behind"


def test_orphans_are_workers_without_a_parent_and_nothing_else(tmp_path: Path) -> None:
    def process(pid: int, parent: int, group: int, *words: str) -> None:
        folder = tmp_path / str(pid)
        folder.mkdir()
        (folder / "cmdline").write_bytes(b"\0".join(w.encode() for w in words) + b"\0")
        (folder / "stat").write_text(f"{pid} (a (strange) name) T {parent} {group} 0")

    process(10, 1, 10, "python", "-m", "compare.worker", "vllm")
    process(11, 99, 11, "python", "-m", "compare.worker", "vllm")  # its parent lives
    process(12, 1, 10, "python", "-m", "compare.worker", "vllm")  # a child of 10, ended with its group
    process(13, 1, 13, "python", "-m", "http.server")
    assert orphans(tmp_path) == [10]


def test_a_worker_of_a_living_parent_is_no_orphan(tmp_path: Path) -> None:
    with EngineProcess("tests.compare.fake_engine", Path(sys.executable), tmp_path / "log") as engine:
        assert engine._process.pid not in orphans()
