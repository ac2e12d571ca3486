"""The work that the model of a GPU's time is told of mixtures: blocks that are filled, experts that move, and what is left out."""

from __future__ import annotations

import dataclasses

import pytest
from kernels.test_triton_cost_linear import launch

from minfer.kernels.bench_moe import routing, touched_by
from minfer.kernels.bench_shapes import SHAPES
from minfer.kernels.triton.cost import moe

# Of 40 pairs, 20 tokens that go to 2 of 8 experts each, three experts get all: blocks of 16 rows are 1, 2 and 1.
STEP = moe.Step(20, 2, 8, [5, 25, 10], 0.5, "bf16")
SIZES = {"K": 1024, "CHUNKS": 4, "BLOCK_M": 16, "BLOCK_N": 64, "DIVISOR": 2, "SORTED": True}
GROUPED = launch("grouped_codes_kernel", (10, 3), **SIZES)


def test_only_filled_blocks_multiply() -> None:
    work = moe._grouped_codes(GROUPED, STEP)
    assert work.turns == [(4,)] * (4 * 3)
    assert work.weights == 64 * 256
    few = dataclasses.replace(STEP, tokens=3, rows=[2, 1, 3])
    unsorted = moe._grouped_codes(launch("grouped_codes_kernel", (6, 3), **{**SIZES, "SORTED": False}), few)
    assert unsorted.turns == [(4,)] * (6 * 3)  # every pair is a block


def test_experts_move_once_and_their_second_blocks_find_them_in_l2() -> None:
    work, n, k = moe._grouped_codes(GROUPED, STEP), 192, 1024
    assert work.bytes == 3 * n * k // 2 + 40 * (k * 2 // 2 + 2 * n)  # two pairs are one row of x
    assert work.operations == 2 * 40 * n * k
    x = 4 * 16 * k * 2 * 3
    loaded = 4 * n * k * 0.5 + x
    assert work.cold == pytest.approx(3 * n * k * 0.5 / loaded)
    assert work.near == pytest.approx(x * (1 - 40 / 64) / loaded)


def test_counting_goes_over_all_pairs_once_an_expert() -> None:
    assert moe._over_pairs(launch("count_kernel", (8,), BLOCK=16), STEP).turns == [(3,)] * 8


def test_a_case_is_that_of_the_bench() -> None:
    """The same experts are touched, whose matrices and the rows are its bytes."""
    model = "qwen3-30b-a3b"
    mixture = SHAPES[model].mixture
    assert mixture is not None
    found = moe.case(model, "bf16", 8)
    touched, weights = touched_by(routing(mixture, 8), mixture), 3 * 2048 * 768
    assert found.bytes == 2 * touched * weights + 2 * 8 * (2 * 2048 + 128)
    assert found.operations == 2 * 64 * weights
    with pytest.raises(ValueError, match="has no experts"):
        moe.case("llama2-7b", "bf16", 8)
