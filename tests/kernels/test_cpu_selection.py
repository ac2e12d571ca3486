"""Which backend, instruction set and number of threads an engine gets, and what it is told when it gets less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minfer.kernels import select_ops
from minfer.kernels.cpu import threads
from minfer.kernels.cpu.library import ISAS, find, load
from minfer.kernels.cpu.runtime import Runtime

needs_library = pytest.mark.skipif(find() is None, reason="the compiled CPU kernels are not built")


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    return done.stdout + done.stderr


SELECT = "import logging, torch; logging.basicConfig(); from minfer.kernels import select_ops; dev = torch.device('cpu')\n"


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_environment_forces_an_instruction_set(isa: str) -> None:
    if not load().minfer_has_isa(isa.encode()):
        pytest.skip(f"this CPU has no {isa}")
    code = "from minfer.kernels.cpu.runtime import Runtime; print(Runtime().isa)"
    assert run_python(code, MINFER_CPU_ISA=isa) == isa + "\n"


@needs_library
def test_an_unknown_instruction_set_is_refused() -> None:
    out = run_python(SELECT + "select_ops(dev, torch.float32)", MINFER_CPU_ISA="avx9")
    assert "MINFER_CPU_ISA must be one that this CPU runs" in out
    assert "'avx9'" in out


@needs_library
def test_auto_takes_compiled_kernels_and_reference_for_float64() -> None:
    assert set(select_ops(torch.device("cpu"), torch.bfloat16).chosen.values()) == {"cpu"}
    assert set(select_ops(torch.device("cpu"), torch.float64).chosen.values()) == {"reference"}


def test_without_the_library_the_user_is_told_once() -> None:
    code = SELECT + "print(set(select_ops(dev, torch.float32).chosen.values())); select_ops(dev, torch.float32)"
    out = run_python(code, MINFER_CPU_LIBRARY="/nonexistent/lib.so")
    assert "{'reference'}" in out
    assert out.count("using plain torch, which is several times slower") == 1


def test_asked_for_by_name_its_absence_is_an_error() -> None:
    out = run_python(SELECT + "select_ops(dev, torch.float32, 'cpu')", MINFER_CPU_LIBRARY="/nonexistent/lib.so")
    assert "ConfigError: backend cpu can't be used" in out


@needs_library
def test_runtimes_have_threads_of_their_own() -> None:
    assert (Runtime(1).threads, Runtime(3).threads) == (1, 3)


def test_cores_are_physical_and_within_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 4, 5}, raising=False)
    for cpu, siblings in ((0, "0,4"), (1, "1,5"), (4, "0,4"), (5, "1,5")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert threads.available_cores() == 2


@pytest.mark.parametrize(("limit", "cores"), [("150000 100000", 1), ("50000 100000", 1), ("300000 100000", 3), ("max 100000", 8)])
def test_a_cgroup_quota_caps_the_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, cores: int) -> None:
    monkeypatch.setattr(threads, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    monkeypatch.setattr(threads, "_cgroup_folders", lambda: [tmp_path])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert threads.available_cores() == cores
