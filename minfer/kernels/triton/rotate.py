"""Rows times the Walsh-Hadamard matrix: what queries, and outputs, of attention over a rotated cache go through.

    grid (T, head groups); a program turns HEADS heads of one token, a tile [HEADS, D]

2 T Hq D values move, log2 D additions a value hide behind them. Left out: doing it in the attention kernel, where every program of a
request, of every split, would do it again.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from minfer.kernels.triton.checks import power_of_2
from minfer.kernels.triton.kv_codes import rotated


@triton.jit
def rotate_kernel(
    x_ptr, out_ptr, x_stride, heads,
    DIM: tl.constexpr, DIM_TILE: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    row, head, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DIM_TILE)
    place = head[:, None] * DIM + at[None, :]
    inside = (head < heads)[:, None] & (at < DIM)[None, :]
    x = rotated(tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(tl.float32), STEPS, FACTOR)
    tl.store(out_ptr + row * (heads * DIM) + place, x.to(out_ptr.dtype.element_ty), mask=inside)


def rotate(x: torch.Tensor, stride: int) -> torch.Tensor:
    """x[T, Hq, D], rows `stride` elements apart, each head along runs of the power of two in D; its own inverse."""
    tokens, heads, dim = x.shape
    out = torch.empty((tokens, heads, dim), dtype=x.dtype, device=x.device)
    width, run = power_of_2(dim), dim & -dim
    tile = min(power_of_2(heads), max(1, 2048 // width))
    meta = {"DIM": dim, "DIM_TILE": width, "HEADS": tile, "STEPS": run.bit_length() - 1, "FACTOR": 1 / math.sqrt(run), "num_warps": 4}
    rotate_kernel[(tokens, triton.cdiv(heads, tile))](x, out, stride, heads, **meta)
    return out
