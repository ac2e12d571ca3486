"""The pool under conditions that break pools: oversubscribed, one thread, many owners, fork, interpreter exit.

Each loop's result is checked; a lost wake-up or a chunk claimed twice shows as a hang (the test's time limit) or a wrong sum.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from minfer.kernels.cpu import CpuBackend
from minfer.kernels.cpu.library import find

pytestmark = pytest.mark.skipif(find() is None, reason="the compiled CPU kernels are not built")

WIDTH = 3001


def check_loops(cpu: CpuBackend, loops: int, seed: int = 0, pause: float = 0.0) -> None:
    """Runs an op of many small chunks over and over on fresh numbers, against torch."""
    generator = torch.Generator().manual_seed(seed)
    for loop in range(loops):
        x = torch.randn(40 + loop % 7, 2 * WIDTH, generator=generator)
        torch.testing.assert_close(cpu.argmax(x), x.argmax(-1))
        if pause:
            time.sleep(pause)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_many_loops(threads: int) -> None:
    check_loops(CpuBackend(threads), 150)


def test_parked_workers_wake() -> None:
    check_loops(CpuBackend(4), 20, pause=0.005)


def test_pools_come_and_go() -> None:
    before = threading.active_count()
    for _ in range(30):
        check_loops(CpuBackend(3), 1)
    assert threading.active_count() == before


def test_two_engines_and_two_threads_on_one_pool() -> None:
    first, second = CpuBackend(2), CpuBackend(3)
    errors: list[BaseException] = []

    def work(cpu: CpuBackend, seed: int) -> None:
        try:
            check_loops(cpu, 60, seed)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(cpu, seed)) for seed, cpu in enumerate((first, second, first, second))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive()
    assert errors == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork() -> None:
    # In a process of its own: torch's OpenMP pool doesn't survive a fork either, so nothing may have started it.
    code = (
        "import os, torch\n"
        "torch.set_num_threads(1)\n"
        "from minfer.kernels.cpu import CpuBackend\n"
        "cpu = CpuBackend(3)\n"
        "x = torch.zeros(64, 5000); x[:, 77] = 1\n"
        "def check(): assert cpu.argmax(x).tolist() == [77] * 64\n"
        "for _ in range(50): check()\n"
        "child = os.fork()\n"
        "for _ in range(50): check()\n"
        "if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_interpreter_exit_with_a_living_pool() -> None:
    code = (
        "import torch, threading\n"
        "from minfer.kernels.cpu import CpuBackend\n"
        "cpu = CpuBackend(4)\n"
        "cpu.argmax(torch.zeros(64, 5000))\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "done\n"
    assert done.stderr == ""
