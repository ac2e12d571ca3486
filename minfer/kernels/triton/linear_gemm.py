"""Many rows times a quantised matrix, with matrix instructions; and the matrix written out, for so many that a library does better.

    grid (row blocks, N / BLOCK_N, SPLITS); a program multiplies [BLOCK_N, its run of K] by [its run of K, BLOCK_M], the product transposed

    words [BLOCK_N, RUN]    16 bytes a thread; part i of them is a run of RUN inputs, straight into a dot's left operand
    x     [RUN, BLOCK_M]    that run
    product += number . x   the groups of a chunk one by one, so that a scale costs one operation an output and group, not one a weight

The matrix stands on the left because of where it comes from: Hopper's matrix unit reads its left operand from registers, where numbers are
when they have been unpacked, and its right one from shared memory, where x has been put by an asynchronous copy. The other way round every
number is stored to shared memory and a barrier waited for before it is used (`predicted-linear-before.json` is of that).
With many rows (SCALED) a number is multiplied by its scale in the activations' type, as in a matrix that was dequantised beforehand: then
the group's sums need no place of their own, and a tile is large enough that weights are unpacked once for 128 rows.

An int4 zero point that is an integer is part of the lift that `codes.py` adds to every number: exact, without a sum of x. Minima that
are no such multiples of their scale (Q4_1, HQQ) are added as min * sum of x; with few rows the matrix unit makes that sum, by ones.

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

from minfer.kernels.triton.codes import code_numbers, code_tile, scaled, widened


@triton.jit
def codes_tile(
    x_row, words_row, real, scales_ptr, mins_ptr, zeros_ptr, table_ptr, n, begin, end,
    K: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    EXCESS: tl.constexpr, LIFTED: tl.constexpr, LIFT: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
    HAS_MINS: tl.constexpr, HAS_ZEROS: tl.constexpr, SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The outputs `real` [BLOCK_N] of the rows at x_row [1, BLOCK_M], over the chunks from `begin` to `end`: [BLOCK_N, BLOCK_M] float32.

    words_row [BLOCK_N, 1]: where the words of those outputs begin. LIFTED: numbers come right, after a LIFT or the group's zero point was
    added; if not, EXCESS is by how much they are too high.
    """
    k = tl.arange(0, RUN)[:, None]
    dtype = x_row.dtype.element_ty
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    lift = tl.full([BLOCK_N, 1], LIFT, dtype)
    SUMS: tl.constexpr = HAS_MINS or EXCESS != 0  # of x over a group: they carry what is the same for every weight of it
    # Added up in the layout of x it takes shuffles and barriers in the loop; with few rows the matrix units have time to multiply by ones.
    SUMS_BY_DOT: tl.constexpr = BLOCK_M == 16
    ones = tl.full([BLOCK_N, RUN], 1.0, dtype)
    for chunk in range(begin, end):
        words = tl.load(words_row + chunk * RUN + tl.arange(0, RUN)[None, :])  # [BLOCK_N, RUN]
        for first in tl.static_range(0, PARTS, SHARED):  # parts that share a scale
            group = tl.minimum((chunk * (RUN * PARTS) + first * RUN) // GROUP, GROUPS - 1)
            if HAS_ZEROS:
                lift = tl.load(zeros_ptr + group * n + real)[:, None]
            if GROUPS > 1:
                scale = tl.load(scales_ptr + group * n + real)[:, None]
            product = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            total = tl.zeros([BLOCK_N if SUMS_BY_DOT else 1, BLOCK_M], tl.float32)
            for part in tl.static_range(first, first + SHARED):
                at = chunk * (RUN * PARTS) + part * RUN
                if K % (RUN * PARTS):
                    x = tl.load(x_row + at + k, mask=at + k < K, other=0.0)
                else:
                    x = tl.load(x_row + at + k)
                number = code_tile(words, lift, table_ptr, part, KIND, LIFTED, PTX, dtype)
                if SCALED:
                    acc = tl.dot(scaled(number, scale.to(dtype), PTX), x, acc, input_precision="ieee")
                elif GROUPS == 1 and not SUMS:  # the scale is the row's, and waits for its end
                    acc = tl.dot(number, x, acc, input_precision="ieee")
                else:
                    product = tl.dot(number, x, product, input_precision="ieee")
                    if SUMS and SUMS_BY_DOT:
                        total = tl.dot(ones, x, total, input_precision="ieee")
                    elif SUMS:
                        total += tl.sum(widened(x, PTX), axis=0)[None, :]
            if GROUPS == 1 and SUMS:
                scale = tl.load(scales_ptr + real)[:, None]
            if not SCALED and (GROUPS > 1 or SUMS):
                acc += product * scale.to(tl.float32)
            if SUMS:
                more = -EXCESS * scale.to(tl.float32)
                if HAS_MINS:
                    more += tl.load(mins_ptr + group * n + real).to(tl.float32)[:, None]
                acc += total * more
    if GROUPS == 1 and not SUMS:
        acc *= tl.load(scales_ptr + real).to(tl.float32)[:, None]
    return acc


@triton.jit
def gemm_codes_kernel(
    x_ptr, codes_ptr, scales_ptr, mins_ptr, zeros_ptr, table_ptr, bias_ptr, out_ptr, rows, n, x_stride,
    K: tl.constexpr, CHUNKS: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    EXCESS: tl.constexpr, LIFTED: tl.constexpr, LIFT: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
    HAS_MINS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the constants mean, `codes_tile` says."""
    row_block, column_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = row_block * BLOCK_M + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[None, :] * x_stride
    real = tl.minimum(column, n - 1)
    words_row = codes_ptr + real.to(tl.int64)[:, None] * (CHUNKS * RUN)
    share: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    acc = codes_tile(
        x_row, words_row, real, scales_ptr, mins_ptr, zeros_ptr, table_ptr, n, split * share, tl.minimum(split * share + share, CHUNKS),
        K, RUN, GROUPS, GROUP, SHARED, EXCESS, LIFTED, LIFT, KIND, PARTS, PTX, HAS_MINS, HAS_ZEROS, SCALED, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    inside = (row < rows)[None, :] & (column < n)[:, None]
    if SPLITS > 1:
        tl.store(out_ptr + (split * rows + row).to(tl.int64)[None, :] * n + column[:, None], acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + real).to(tl.float32)[:, None]
        tl.store(out_ptr + row.to(tl.int64)[None, :] * n + column[:, None], acc.to(out_ptr.dtype.element_ty), mask=inside)


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
    codes_ptr, scales_ptr, mins_ptr, zeros_ptr, table_ptr, out_ptr, n,
    K: tl.constexpr, CHUNKS: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, EXCESS: tl.constexpr,
    KIND: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr, HAS_MINS: tl.constexpr, HAS_ZEROS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """grid (N, CHUNKS / TILE): TILE chunks of one output's weights."""
    row, word = tl.program_id(0).to(tl.int64), tl.arange(0, TILE * RUN)
    chunk = tl.program_id(1) * TILE + word // RUN
    words = tl.load(codes_ptr + row * (CHUNKS * RUN) + chunk * RUN + word % RUN, mask=chunk < CHUNKS, other=0)
    for part in tl.static_range(PARTS):
        k = chunk * (RUN * PARTS) + part * RUN + word % RUN
        inside = k < K
        at = tl.minimum(k // GROUP, GROUPS - 1) * n + row
        number = code_numbers(words, table_ptr, part, KIND, PTX) - EXCESS
        if HAS_ZEROS:
            number += tl.load(zeros_ptr + at).to(tl.float32)
        number *= tl.load(scales_ptr + at).to(tl.float32)
        if HAS_MINS:
            number += tl.load(mins_ptr + at).to(tl.float32)
        tl.store(out_ptr + row * K + k, number.to(out_ptr.dtype.element_ty), mask=inside)
