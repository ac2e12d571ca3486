"""Grouped products: each block of rows times the matrix of its expert. One kernel for dense matrices, one for codes, one for 8-bit rows.

    grid (blocks, N / BLOCK_N); a program multiplies [BLOCK_N, K] of one expert by [K, BLOCK_M], the rows of one block

    block b     expert e, pairs p0 p1 p2 --         `moe_route.py` made the list
    x           row p // DIVISOR of each pair       gate and up: DIVISOR = top_k, tokens; down: 1, the pairs' own rows
    w           matrix e, streamed along K
    out         row p of each pair                  nothing is put back in order, as nothing was moved

An expert that was chosen is read once for each block of its rows, and one that wasn't, never: at decode min(E, T top_k) of E matrices move,
2 bytes a weight, 1 (fp8) or 0.53 (int4 in groups of 128), for 2 operations a weight and row. So few rows are bound by memory, and padding
them to a block of 16 costs nothing that matters; with many rows, 2 T top_k N K operations are done for at most BLOCK_M - 1 rows of
padding an expert.

Consecutive programs are blocks, not columns: blocks of one expert follow each other, so its columns come from memory once. The matrix
stands on the left, and the loops over codes and over 8-bit rows are those of the plain products, `codes_tile` and `w8a8_tile`. Sums run
along K in one order, so a row doesn't depend on the block that it is in.

Tried: gate and up in one program, with the activation at its end. It needs two sums of the tile's size, hence tiles half as wide, which
read x twice as often; what it saves is one launch and 3 T top_k I values that lie in L2. Left out: cutting K among programs where there
are few blocks, and runs of several blocks of one expert a program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minfer.kernels.triton.linear_gemm import codes_tile
from minfer.kernels.triton.linear_w8a8 import w8a8_tile
from minfer.kernels.triton.moe_route import block_of


@triton.jit
def grouped_dense_kernel(
    x_ptr, weight_ptr, block_experts_ptr, block_pairs_ptr, out_ptr, pairs, n, x_stride, out_stride,
    K: tl.constexpr, DIVISOR: tl.constexpr, SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, pair = block_of(block_experts_ptr, block_pairs_ptr, pairs, SORTED, BLOCK_M)
    if expert >= 0:
        column, k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        own = weight_ptr + expert.to(tl.int64) * n * K
        w_at = own + tl.minimum(column, n - 1).to(tl.int64)[:, None] * K + k[None, :]
        x_at = x_ptr + (tl.minimum(pair, pairs - 1) // DIVISOR).to(tl.int64)[None, :] * x_stride + k[:, None]
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K:
                w = tl.load(w_at + start, mask=(start + k < K)[None, :], other=0.0)
                x = tl.load(x_at + start, mask=(start + k < K)[:, None], other=0.0)
            else:
                w, x = tl.load(w_at + start), tl.load(x_at + start)
            acc = tl.dot(w, x, acc, input_precision="ieee")
        _store(acc, out_ptr, pair, column, pairs, n, out_stride)


@triton.jit
def grouped_codes_kernel(
    x_ptr, codes_ptr, scales_ptr, mins_ptr, zeros_ptr, table_ptr, block_experts_ptr, block_pairs_ptr, out_ptr,
    pairs, n, x_stride, out_stride,
    K: tl.constexpr, CHUNKS: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    EXCESS: tl.constexpr, LIFTED: tl.constexpr, LIFT: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
    HAS_MINS: tl.constexpr, HAS_ZEROS: tl.constexpr, SCALED: tl.constexpr, DIVISOR: tl.constexpr, SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the constants mean, `codes_tile` says."""
    expert, pair = block_of(block_experts_ptr, block_pairs_ptr, pairs, SORTED, BLOCK_M)
    if expert >= 0:
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        real, wide = tl.minimum(column, n - 1), expert.to(tl.int64)
        words_row = codes_ptr + (wide * n + real)[:, None] * (CHUNKS * RUN)
        x_row = x_ptr + (tl.minimum(pair, pairs - 1) // DIVISOR).to(tl.int64)[None, :] * x_stride
        groups, mins_at, zeros_at = wide * (GROUPS * n), mins_ptr, zeros_ptr  # the last two may be None
        if HAS_MINS:
            mins_at += groups
        if HAS_ZEROS:
            zeros_at += groups
        acc = codes_tile(
            x_row, words_row, real, scales_ptr + groups, mins_at, zeros_at, table_ptr, n, 0, CHUNKS,
            K, RUN, GROUPS, GROUP, SHARED, EXCESS, LIFTED, LIFT, KIND, PARTS, PTX, HAS_MINS, HAS_ZEROS, SCALED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        _store(acc, out_ptr, pair, column, pairs, n, out_stride)


@triton.jit
def grouped_bytes_kernel(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, block_experts_ptr, block_pairs_ptr, out_ptr, pairs, n, out_stride,
    K: tl.constexpr, GROUPS: tl.constexpr, DIVISOR: tl.constexpr, SORTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert, pair = block_of(block_experts_ptr, block_pairs_ptr, pairs, SORTED, BLOCK_M)
    if expert >= 0:
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        real, wide, row = tl.minimum(column, n - 1), expert.to(tl.int64), (tl.minimum(pair, pairs - 1) // DIVISOR).to(tl.int64)
        w_at, x_at = codes_ptr + (wide * n + real)[:, None] * K, x_ptr + row[None, :] * K
        scales_at = scales_ptr + wide * (GROUPS * n)
        STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
        acc = w8a8_tile(x_at, x_scales_ptr, row, w_at, scales_at, real, n, 0, STEPS, K, GROUPS, BLOCK_M, BLOCK_N, BLOCK_K)
        _store(acc, out_ptr, pair, column, pairs, n, out_stride)


@triton.jit
def _store(acc, out_ptr, pair, column, pairs, n, out_stride):
    at = out_ptr + pair.to(tl.int64)[None, :] * out_stride + column[:, None]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(pair < pairs)[None, :] & (column < n)[:, None])


@triton.jit
def combine_kernel(
    y_ptr, shares_ptr, shared_ptr, gate_ptr, out_ptr, width, shared_stride, gate_stride,
    TOP_K: tl.constexpr, HAS_SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (T, H / BLOCK): a token's pairs times their shares, the highest share first, and what every token has."""
    token, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    acc = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP_K):
        y = tl.load(y_ptr + (token * TOP_K + place) * width + at, mask=inside, other=0.0).to(tl.float32)
        acc += y * tl.load(shares_ptr + token * TOP_K + place)
    if HAS_SHARED:
        share = 1.0 / (1.0 + tl.exp(-tl.load(gate_ptr + token * gate_stride).to(tl.float32)))
        acc += share * tl.load(shared_ptr + token * shared_stride + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
