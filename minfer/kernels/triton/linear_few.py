"""A few rows times a quantised matrix: every weight is read once, so nothing but the reading should take time.

    grid (N / BLOCK_N); a program owns BLOCK_N outputs and walks K, TILE chunks at a time, each warp a chunk of its own

                             TILE chunks of RUN words, 16 bytes a thread
    words [TILE, BLOCK_N, RUN]     part i of them is a run of inputs, the left operand of a matrix instruction
    x     [TILE, RUN, BLOCK_M]     that run of every row; rows past the last are zero, and not read
    acc   [TILE, BLOCK_N, BLOCK_M] the chunks are added up once, after the last turn: nothing is exchanged between warps before

What it must move: 4 bits a weight and 32 a group; an H200 can issue 3 to 4 instructions for each weight that comes at full bandwidth, so
those are what is counted here. A sum of products on the float pipe takes 5.2 a weight (the number as float32, times scale, plus
minimum, times x). A matrix instruction of 16 outputs x 8 rows x 16 inputs does what 8 such additions do, exactly, whether one row is
real or eight: what is left is mostly unpacking. Cutting K among the warps of one program, not among programs, needs no second pass.

The scale comes once for an output, a row and a group. The order of additions is decided by K alone, so a row doesn't see its neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minfer.kernels.triton.codes import code_tile


@triton.jit
def few_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, mins_ptr, zeros_ptr, table_ptr, bias_ptr, out_ptr, rows, n, x_stride,
    K: tl.constexpr, CHUNKS: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    EXCESS: tl.constexpr, LIFTED: tl.constexpr, LIFT: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr,
    HAS_MINS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """LIFTED: numbers come right, after a LIFT or the group's zero point was added; if not, EXCESS is by how much they are too high."""
    column, row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    real = tl.minimum(column, n - 1)
    slot, word = tl.arange(0, TILE), tl.arange(0, RUN)
    codes_at = codes_ptr + real.to(tl.int64)[None, :, None] * (CHUNKS * RUN) + word[None, None, :]
    x_row, x_real = x_ptr + row.to(tl.int64)[None, None, :] * x_stride, (row < rows)[None, None, :]
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros([TILE, BLOCK_N, BLOCK_M], tl.float32)
    lift = tl.full([TILE, BLOCK_N, 1], LIFT, dtype)
    SUMS: tl.constexpr = HAS_MINS or EXCESS != 0  # of x over a group, which carry what is the same for every weight of it: by ones
    ones = tl.full([TILE, BLOCK_N, RUN], 1.0, dtype)
    for start in range(0, CHUNKS, TILE):
        chunk = start + slot
        # Chunks past the end repeat the last: x is zero there.
        words = tl.load(codes_at + (tl.minimum(chunk, CHUNKS - 1) * RUN)[:, None, None])
        for first in tl.static_range(0, PARTS, SHARED):  # parts that share a scale
            group = tl.minimum((chunk * (RUN * PARTS) + first * RUN) // GROUP, GROUPS - 1)
            of_group = group[:, None] * n + real[None, :]  # [TILE, BLOCK_N]
            if HAS_ZEROS:
                lift = tl.load(zeros_ptr + of_group)[:, :, None]
            product = tl.zeros([TILE, BLOCK_N, BLOCK_M], tl.float32)
            total = tl.zeros([TILE, BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.static_range(first, first + SHARED):
                k = (chunk * (RUN * PARTS) + part * RUN)[:, None, None] + word[None, :, None]
                if K % (RUN * PARTS * TILE):
                    x = tl.load(x_row + k, mask=x_real & (k < K), other=0.0)
                else:
                    x = tl.load(x_row + k, mask=x_real, other=0.0)
                number = code_tile(words, lift, table_ptr, part, KIND, LIFTED, PTX, dtype)
                if GROUPS == 1 and not SUMS:  # the scale is the row's, and waits for its end
                    acc = tl.dot(number, x, acc, input_precision="ieee")
                else:
                    product = tl.dot(number, x, product, input_precision="ieee")
                    if SUMS:
                        total = tl.dot(ones, x, total, input_precision="ieee")
            if GROUPS > 1 or SUMS:
                scale = tl.load(scales_ptr + of_group).to(tl.float32)[:, :, None]
                acc += product * scale
            if SUMS:
                more = -EXCESS * scale
                if HAS_MINS:
                    more += tl.load(mins_ptr + of_group).to(tl.float32)[:, :, None]
                acc += total * more
    out = tl.sum(acc, axis=0)  # [BLOCK_N, BLOCK_M]
    if GROUPS == 1 and not SUMS:
        out *= tl.load(scales_ptr + real).to(tl.float32)[:, None]
    if HAS_BIAS:
        out += tl.load(bias_ptr + real).to(tl.float32)[:, None]
    inside = (row < rows)[None, :] & (column < n)[:, None]
    tl.store(out_ptr + row.to(tl.int64)[None, :] * n + column[:, None], out.to(out_ptr.dtype.element_ty), mask=inside)
