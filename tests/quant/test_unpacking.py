"""Bits and groups by themselves, against loops that do what the words say."""

from __future__ import annotations

import pytest
import torch
from formats import pairs, stream
from hypothesis import given, settings
from hypothesis import strategies as st

from minfer.errors import ModelLoadError
from minfer.quant.bits import unpack_continuous, unpack_nibbles, unpack_padded
from minfer.quant.groups import expand_blocks, expand_runs, integers


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_stream_of_codes_comes_out_as_it_went_in(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 64))
    words = stream(codes, bits)
    assert words.shape[-1] == 2 * bits
    for count in (64, 61, 1):
        assert torch.equal(unpack_continuous(words, bits, count), codes[..., :count].byte())


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_with_spare_bits(bits: int) -> None:
    fields = 32 // bits
    codes = torch.randint(0, 2**bits, (4, 3 * fields))
    words = (codes.view(4, 3, fields) << torch.arange(fields) * bits).sum(-1)
    assert torch.equal(unpack_padded(words.to(torch.int32), bits, 3 * fields - 1), codes[:, :-1].byte())


def test_nibbles_of_either_order() -> None:
    codes = torch.randint(0, 16, (3, 10))
    assert torch.equal(unpack_nibbles(pairs(codes)), codes.byte())
    assert torch.equal(unpack_nibbles(pairs(codes, high_first=True), high_first=True), codes.byte())


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 12), k=st.integers(1, 40), block=st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_blocks_written_out(n: int, k: int, block: tuple[int, int]) -> None:
    grid = torch.randn(-(-n // block[0]), -(-k // block[1]))
    wide, group = expand_blocks(grid, (n, k), block)
    for row in range(n):
        for column in range(k):
            assert wide[row, column // group] == grid[row // block[0], column // block[1]]


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 12), k=st.integers(1, 40), run=st.integers(1, 100))
def test_runs_that_cross_rows_written_out(n: int, k: int, run: int) -> None:
    values = torch.randn(-(-n * k // run))
    wide, group = expand_runs(values, (n, k), run)
    for row in range(n):
        for column in range(k):
            assert wide[row, column // group] == values[(row * k + column) // run]


def test_absurd_blocks_cost_nothing_and_wrong_counts_are_refused() -> None:
    wide, group = expand_blocks(torch.ones(1), (4, 8), (2**31 - 1, 2**31 - 1))
    assert (tuple(wide.shape), group) == ((4, 1), 8)
    with pytest.raises(ModelLoadError, match="needs 2 scales, not 3"):
        expand_blocks(torch.ones(3), (4, 8), (4, 4))
    with pytest.raises(ModelLoadError, match="needs 2 scales, not 3"):
        expand_runs(torch.ones(3), (4, 8), 16)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", ["middle", "none", "whole", "fraction"])
def test_integers_with_every_kind_of_zero_point(bits: int, kind: str) -> None:
    codes, scales = torch.randint(0, 2**bits, (5, 64)), torch.rand(5, 2).half()
    middle = torch.full((5, 2), 2 ** (bits - 1))
    zeros = {"middle": middle, "none": None, "whole": torch.randint(0, 2**bits, (5, 2)), "fraction": torch.rand(5, 2).half() * 2**bits}[
        kind
    ]
    packed = integers(codes.byte(), bits, scales, zeros, (1, 32))
    exact = (codes - (middle if zeros is None else zeros).double().repeat_interleave(32, 1)) * scales.double().repeat_interleave(32, 1)
    # A fractional zero point has more bits than a float32 minimum; whole ones are exact.
    room = 256 * 2.0**-22 if kind == "fraction" else 0.0
    torch.testing.assert_close(packed.dequantize(), exact.float(), atol=room, rtol=0)
    torch.testing.assert_close(packed.widened().dequantize(), exact.float(), atol=room, rtol=0)
    if kind in ("middle", "none"):
        assert packed.scheme.symmetric
        assert packed.mins is None
