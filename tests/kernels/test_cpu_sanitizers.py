"""The kernel tests once more, in builds that check memory, undefined behaviour and races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minfer.kernels.cpu.build import build

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++"),
]


def run_under(sanitizer: str, runtimes: list[str], options: dict[str, str], tests: list[str], folder: Path) -> None:
    library = build(sanitizer, folder)
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip() for name in runtimes
    ]
    environment = {**os.environ, **options, "MINFER_CPU_LIBRARY": str(library), "LD_PRELOAD": ":".join(preload), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *[str(HERE / test) for test in tests]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert "runtime error" not in done.stdout + done.stderr


def test_address_and_undefined_behaviour(tmp_path: Path) -> None:
    # The interpreter and torch never free everything, and were not built to be watched: only errors count, not leaks.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
    parts = ("elementwise", "attention", "kv_quant", "linear", "sample", "arena", "recorder", "moe")
    tests = [*(f"test_cpu_{part}.py" for part in parts), "test_lora.py"]
    run_under("address,undefined", ["libasan.so", "libubsan.so"], options, tests, tmp_path)


def test_races(tmp_path: Path) -> None:
    tests = ["test_cpu_pool.py::test_many_loops", "test_cpu_pool.py::test_parked_workers_wake", "test_cpu_recorder.py"]
    run_under("thread", ["libtsan.so"], {"TSAN_OPTIONS": "halt_on_error=1:report_bugs=1"}, tests, tmp_path)
