"""The work that the model of a GPU's time is told of products: turns, bytes, which launches share their code, and the step's table."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from triton.runtime.jit import JITFunction

from minfer.kernels.triton.aot import Launch
from minfer.kernels.triton.cost import linear, step
from minfer.kernels.triton.cost.devices import H200


class Function:
    def __init__(self, name: str) -> None:
        self.fn = type("fn", (), {"__name__": name})


def launch(name: str, grid: tuple[int, ...], **constants: Any) -> Launch:
    function: JITFunction = Function(name)  # type: ignore[assignment]
    return Launch(function, {}, constants, [], {"num_warps": 4}, grid)


GEMM = launch("gemm_codes_kernel", (2, 3, 4), K=1536, CHUNKS=6, RUN=64, PARTS=4, GROUPS=12, GROUP=128, BLOCK_M=16, BLOCK_N=64, SPLITS=4)


def test_turns_are_those_of_the_kernels() -> None:
    """Six chunks over four programs: two each, and none for the last."""
    assert list(linear._runs(6, 4)) == [2, 2, 2, 0]
    work = linear._gemm_codes(GEMM, 20, 0.5, "bf16")
    assert work.turns == [(2,)] * 18 + [(0,)] * 6
    assert work.weights == 64 * 256


def test_bytes_are_the_matrix_once_and_what_goes_in_and_out() -> None:
    n, k = 192, 1536
    work = linear._gemm_codes(GEMM, 20, 0.5, "bf16")
    assert work.bytes == n * k // 2 + 2 * 20 * k + 4 * 4 * 20 * n  # four partial sums in float32
    assert work.operations == 2 * 20 * n * k
    matrix, x = n * k * 0.5, 32 * k * 2 * 3
    assert work.cold == pytest.approx(matrix / (2 * matrix + x))  # two blocks of rows read it, the second from L2
    assert work.near == pytest.approx(x * 12 / 32 / (2 * matrix + x))


def test_launches_that_differ_in_turns_share_their_code() -> None:
    wide = dataclasses.replace(GEMM, constants={**GEMM.constants, "K": 14336, "CHUNKS": 56, "GROUPS": 112})
    assert linear._same_code(GEMM) == linear._same_code(wide)
    assert linear._same_code(wide).constants["GROUPS"] == 32
    ragged = dataclasses.replace(GEMM, constants={**GEMM.constants, "K": 1600, "CHUNKS": 7})
    assert linear._same_code(ragged) is ragged  # its loads are masked


def test_the_sum_of_a_step() -> None:
    def row(name: str, taken: float, launches: int) -> dict[str, Any]:
        return {"case": name, "device": "H200 SXM", "predicted_us": taken, "launches": [{}] * launches}

    results = {"linear": {"cases": [row("llama3.1-8b, int4, 1 row", 100.0, 4)]}, "attention": {"cases": [row("decode, 1 x 4096", 10.0, 2)]}}
    cells = step._row(results, "H200 SXM", "int4", 0.53125, 1).split(" | ")
    head = 2 * 4096 * 128256 / H200.read_bandwidth * 1e6
    assert cells[3:6] == ["3200", "166", "320"]
    assert int(cells[8]) == round(3200 + 320 + 32 * 4 * 1.3 + head)
    assert step.step_table({"linear": {}}) == []
