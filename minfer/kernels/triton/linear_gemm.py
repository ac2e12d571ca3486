"""Many rows times a quantised matrix, with matrix instructions; and the matrix written out, for so many that a library does better.

    grid (row blocks, N / BLOCK_N, SPLITS); a program multiplies [BLOCK_M, its run of K] by [its run of K, BLOCK_N]

    words [32, BLOCK_N]     16 bytes a thread; part i of them is a run of 32 inputs, straight into a dot's operand
    x     [BLOCK_M, 32]     that run
    product += x . number   the groups of a chunk one by one, so that a scale costs one operation an output and group, not one a weight

With few tiles K is cut into SPLITS runs that leave float32 partial sums for `reduce_kernel`: no atomics, so a result doesn't depend on
who came first. The cut depends on N, K and the tile of rows only.

`dequantize_kernel`: the matrix in the activations' type. It moves 2.5 bytes a weight (int4) besides what the product then reads, which
from some hundred rows on costs less than the product loses by unpacking every tile again for every block of rows.

Tried, by what the compilers made of it: scales as [N, groups]: each one a 4-byte load, and spills; so they are [groups, N]. A partial sum
for each part: spills at 64 rows; so parts that share a scale share it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minfer.kernels.triton.codes import code_numbers, code_tile, widened


@triton.jit
def gemm_codes_kernel(
    x_ptr, codes_ptr, scales_ptr, mins_ptr, table_ptr, bias_ptr, out_ptr, rows, n, x_stride,
    K: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, EXCESS: tl.constexpr,
    KIND: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr, HAS_MINS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_block, column_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = row_block * BLOCK_M + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride
    real = tl.minimum(column, n - 1)
    k = tl.arange(0, 32)
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # The sum of x over a group, which carries the minima. Added up in the layout of x it takes shuffles, shared memory and barriers in the
    # loop; with few rows the matrix units have the time to multiply by ones, and the result lies as the product does.
    SUMS_BY_DOT: tl.constexpr = BLOCK_M == 16
    ones = tl.full([32, BLOCK_N], 1.0, dtype)
    share: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    for chunk in range(split * share, tl.minimum(split * share + share, CHUNKS)):
        words = tl.load(codes_ptr + real.to(tl.int64)[None, :] * (CHUNKS * 32) + chunk * 32 + k[:, None])  # [32, BLOCK_N]
        for first in tl.static_range(0, PARTS, SHARED):  # parts that share a scale
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            if SUMS_BY_DOT:
                total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            else:
                total = tl.zeros([BLOCK_M, 1], tl.float32)
            for part in tl.static_range(first, first + SHARED):
                at = chunk * (32 * PARTS) + part * 32
                if K % (32 * PARTS):
                    x = tl.load(x_row + at + k[None, :], mask=(at + k < K)[None, :], other=0.0)
                else:
                    x = tl.load(x_row + at + k[None, :])
                number = code_tile(words, table_ptr, part, KIND, PTX, dtype)
                product = tl.dot(x, number, product, input_precision="ieee")
                if HAS_MINS or EXCESS != 0:
                    if SUMS_BY_DOT:
                        total = tl.dot(x, ones, total, input_precision="ieee")
                    else:
                        total += tl.sum(widened(x, PTX), axis=1)[:, None]
            group = tl.minimum((chunk * (32 * PARTS) + first * 32) // GROUP, GROUPS - 1)
            scale = tl.load(scales_ptr + group * n + real).to(tl.float32)
            acc += product * scale[None, :]
            if HAS_MINS or EXCESS != 0:
                lift = -EXCESS * scale
                if HAS_MINS:
                    lift += tl.load(mins_ptr + group * n + real).to(tl.float32)
                acc += total * lift[None, :]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    if SPLITS > 1:
        tl.store(out_ptr + (split * rows + row).to(tl.int64)[:, None] * n + column[None, :], acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + real).to(tl.float32)[None, :]
        tl.store(out_ptr + row.to(tl.int64)[:, None] * n + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(partial_ptr, bias_ptr, out_ptr, rows, n, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the splits of one row, in their order."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + (split * rows + row) * n + at, mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    codes_ptr, scales_ptr, mins_ptr, table_ptr, out_ptr, n,
    K: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, EXCESS: tl.constexpr,
    KIND: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr, HAS_MINS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """grid (N, CHUNKS / TILE): TILE chunks of one output's weights."""
    row, word = tl.program_id(0).to(tl.int64), tl.arange(0, TILE * 32)
    chunk = tl.program_id(1) * TILE + word // 32
    words = tl.load(codes_ptr + row * (CHUNKS * 32) + chunk * 32 + word % 32, mask=chunk < CHUNKS, other=0)
    for part in tl.static_range(PARTS):
        k = chunk * (32 * PARTS) + part * 32 + word % 32
        inside = k < K
        at = tl.minimum(k // GROUP, GROUPS - 1) * n + row
        number = (code_numbers(words, table_ptr, part, KIND, PTX) - EXCESS) * tl.load(scales_ptr + at).to(tl.float32)
        if HAS_MINS:
            number += tl.load(mins_ptr + at).to(tl.float32)
        tl.store(out_ptr + row * K + k, number.to(out_ptr.dtype.element_ty), mask=inside)
