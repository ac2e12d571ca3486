"""Rotary embedding of q and k in place, in one launch.

Values i and i + D/2 of a head are a pair that turns by the angle of its position:

    first' = first cos - second sin,   second' = second cos + first sin        table row: cos (D/2) | sin (D/2)

    grid (T, programs of q | programs of k); a program turns HEADS heads of one token: a tile [HEADS, D/2], twice

It moves 2 T (Hq + Hk) D values and the table's rows, which stay in L2. Unlike the reference, which rounds the cosines and each
product to the tensor's type, the arithmetic is float32 with one rounding at the end.

Left out: interleaved pairs (i, i + 1) and heads that turn only in part; no model of ours needs them yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.triton.checks import index, power_of_2, row_stride, shaped

_TILE = 1024  # pairs a program turns


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    positions_ptr,
    table_ptr,
    q_stride,
    k_stride,
    q_heads,
    k_heads,
    q_programs,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,  # D/2 rounded up to a power of two
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part < q_programs:
        base, heads, first_head = q_ptr + row * q_stride, q_heads, part * HEADS
    else:
        base, heads, first_head = k_ptr + row * k_stride, k_heads, (part - q_programs) * HEADS
    position = tl.load(positions_ptr + row).to(tl.int64)
    pair = tl.arange(0, HALF)
    half: tl.constexpr = DIM // 2
    cos = tl.load(table_ptr + position * DIM + pair, mask=pair < half, other=0.0)[None, :]
    sin = tl.load(table_ptr + position * DIM + half + pair, mask=pair < half, other=0.0)[None, :]
    head = first_head + tl.arange(0, HEADS)
    at = base + head[:, None] * DIM + pair[None, :]  # [HEADS, HALF]
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + half, mask=inside, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    tl.store(at, (first * cos - second * sin).to(dtype), mask=inside)
    tl.store(at + half, (second * cos + first * sin).to(dtype), mask=inside)


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
    (rows, q_heads, dim), k_heads = q.shape, k.shape[1]
    shaped("k", k, rows, k_heads, dim)
    shaped("positions", positions, rows)
    index("positions", positions, q, torch.int32, torch.int64)
    if table.dtype != torch.float32 or not table.is_contiguous() or table.shape[1] != dim:
        raise ConfigError(f"the rotary table must be contiguous float32 [positions, {dim}], not {table.dtype} {list(table.shape)}")
    q_stride, k_stride = row_stride("q", q), row_stride("k", k, q)
    if not rows:
        return
    half = power_of_2(dim // 2)
    heads = min(power_of_2(q_heads), max(1, _TILE // half))
    q_programs, k_programs = triton.cdiv(q_heads, heads), triton.cdiv(k_heads, heads)
    sizes = (q_stride, k_stride, q_heads, k_heads, q_programs)
    rotary_kernel[(rows, q_programs + k_programs)](q, k, positions, table, *sizes, DIM=dim, HEADS=heads, HALF=half, num_warps=4)
