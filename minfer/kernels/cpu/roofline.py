"""What this machine can do at best: memory read bandwidth and the peak of each kind of multiplication, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minfer.kernels.cpu.runtime import Runtime

_BYTES = 256 * 1024 * 1024  # far beyond any last-level cache
_PIECE = 128 * 1024  # as in roofline.cpp


@dataclass(frozen=True)
class Roofline:
    """Bytes a second read from memory; operations a second (a multiply-add is two), 0 where there is no such unit."""

    bandwidth: float
    float32: float
    bfloat16: float
    int8: float


def measure(runtime: Runtime, repeats: int = 7) -> Roofline:
    """Best of `repeats` short runs each: a ceiling is what the machine reaches when nobody disturbs it."""
    data = torch.ones(_BYTES, dtype=torch.uint8)
    sums = torch.empty(_BYTES // _PIECE, dtype=torch.int64)
    read = runtime.op("read_memory", "ptr data, ptr out, int bytes")
    best = min(_seconds(lambda: read(data.data_ptr(), sums.data_ptr(), _BYTES)) for _ in range(repeats))
    return Roofline(_BYTES / best, *[_peak(runtime, name, repeats) for name in ("float32", "bfloat16", "int8")])


def _peak(runtime: Runtime, name: str, repeats: int) -> float:
    kernel = runtime.op(f"peak_{name}", "ptr operations, int rounds")
    done = torch.zeros(1, dtype=torch.float64)
    best = min(_seconds(lambda: kernel(done.data_ptr(), 50_000)) for _ in range(repeats))
    return float(done) / best


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
