from __future__ import annotations

import functools

import pytest

from minfer.kernels.cpu import CpuBackend
from minfer.kernels.cpu.library import ISAS, find, load


@functools.cache
def backend_of(isa: str, threads: int = 2) -> CpuBackend:
    return CpuBackend(threads, isa)


@pytest.fixture(params=ISAS)
def cpu(request: pytest.FixtureRequest) -> CpuBackend:
    """The compiled backend on each instruction set that this machine runs."""
    if find() is None:
        pytest.skip("the compiled CPU kernels are not built")
    if not load().minfer_has_isa(request.param.encode()):
        pytest.skip(f"this CPU has no {request.param}")
    return backend_of(request.param)
