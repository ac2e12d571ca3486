"""From the scales a file stores to the form every kernel knows: one scale for each row and run of `group_size` inputs.

Files store one for the matrix, one a row, one a group, or one for a block of rows and inputs, whose last block may be cut off
by the edge. All are a grid of blocks, so one function writes them out. A group that doesn't divide the row is split into
runs that do: 576 inputs in blocks of 128 become nine groups of 64, the last of them alone in its block.
"""

from __future__ import annotations

import math

import torch

from minfer.errors import ModelLoadError
from minfer.quant.elements import Element
from minfer.quant.packed import PackedWeight, QuantScheme

_ELEMENTS: dict[int, Element] = {1: "int2", 2: "int2", 3: "int3", 4: "int4", 5: "int8", 6: "int8", 7: "int8", 8: "int8"}


def grid_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks down and across; those at the edges may be partial."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def expand_blocks(grid: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> tuple[torch.Tensor, int]:
    """A value for each block of (rows, inputs) -> a value for each row and group, [N, K / group_size], and the group's size."""
    n, k = shape
    block = (min(block[0], n), min(block[1], k))
    rows, columns = grid_shape(shape, block)
    if grid.numel() != rows * columns:
        raise ModelLoadError(f"{[n, k]} in blocks of {list(block)} needs {rows * columns} scales, not {grid.numel()}")
    group = math.gcd(block[1], k)
    index = torch.arange(0, k, group, device=grid.device) // block[1]
    return grid.reshape(rows, columns).repeat_interleave(block[0], 0)[:n].index_select(1, index), group


def expand_runs(values: torch.Tensor, shape: tuple[int, int], run: int) -> tuple[torch.Tensor, int]:
    """The same for values of runs of the matrix read as one long row, which may end in the middle of a row (bitsandbytes, HQQ)."""
    n, k = shape
    if values.numel() != -(-n * k // run):
        raise ModelLoadError(f"{[n, k]} in runs of {run} needs {-(-n * k // run)} scales, not {values.numel()}")
    group = math.gcd(run, k)
    index = torch.arange(0, n * k, group, device=values.device) // run
    return values.flatten()[index].view(n, k // group), group


def integers(
    codes: torch.Tensor,
    bits: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    block: tuple[int, int],
    input_order: torch.Tensor | None = None,
) -> PackedWeight:
    """Unsigned codes uint8 [N, K] with scale * (code - zero): scales and zeros are a grid of `block`s, or a zero for each scale.

    No zeros, or all of them in the middle, means symmetric. Codes of more than 4 bits go by int8.
    """
    middle = 2 ** (bits - 1)
    shape = (codes.shape[0], codes.shape[1])
    wide, group = expand_blocks(scales.float(), shape, block)
    element = _ELEMENTS[bits]
    if zeros is None or bool((zeros == middle).all()):
        return PackedWeight(_signed(codes, middle), wide, None, QuantScheme(element, group, True), input_order=input_order)
    shift = 128 if bits == 8 else 0
    wide_zeros, _ = expand_blocks(zeros.float(), shape, block)
    mins = wide * (shift - wide_zeros)
    return PackedWeight(_signed(codes, shift), wide, mins, QuantScheme(element, group, False), input_order=input_order)


def _signed(codes: torch.Tensor, shift: int) -> torch.Tensor:
    """uint8 -> int8 minus a shift; modulo 256 the two types' subtraction is the same."""
    return (codes - shift).view(torch.int8) if shift else codes.contiguous().view(torch.int8)
