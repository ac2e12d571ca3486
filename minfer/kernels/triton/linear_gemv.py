"""One row times a quantised matrix as a sum on the float pipe, for CDNA: there unpacking for a matrix instruction costs more than that.

    grid (N / 16); a program owns two sets of COLUMNS = 8 outputs and walks K, TILE chunks at a time

                          TILE chunks of RUN words, 16 bytes a thread
    set a, 8 columns    [ w w w w | w w w w | ... ]     acc[column, chunk, word] += x * (number * scale + minimum), part by part
    set b, 8 columns    [ w w w w | w w w w | ... ]     the same x, loaded and widened once for both
    x                     runs of inputs, from L1: part i of the words goes with run i

What it must move: 4 bits a weight and 16 (or 32) a group; what it must do: 2 operations a weight. Counted in the loop's machine code for
gfx942 it does 3.8 instructions a weight of int4 in groups of 128; an MI300X can issue 5 for each weight that comes at full bandwidth. (For
sm_90 it was 5.2, where 3 to 4 are to be had: that is why `linear_few.py` exists.)
The accumulator keeps the words apart, so that nothing is exchanged between threads before the end; K alone decides the order of additions.

Tried: x loaded once a program: each run went through shared memory to reach the layout of the codes; so every column loads it again,
from L1, and two columns share that. Sums over a group first, and its scale and minimum on the sum: as many instructions in groups of 128
and 8.5 a weight in groups of 32 (sm_90), because every group ends in a reduction over threads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from minfer.kernels.triton.codes import code_numbers, widened


@triton.jit
def gemv_codes_kernel(
    x_ptr, codes_ptr, scales_ptr, mins_ptr, zeros_ptr, table_ptr, bias_ptr, out_ptr, n,
    K: tl.constexpr, CHUNKS: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr,
    EXCESS: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, PTX: tl.constexpr, HAS_MINS: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """SHARED: how many parts of a word belong to one group. EXCESS: by how much numbers are too high, beyond what `zeros` says."""
    place = tl.program_id(0) * (2 * COLUMNS) + tl.arange(0, COLUMNS)
    a = tl.minimum(place, n - 1)[:, None].to(tl.int64)
    b = tl.minimum(place + COLUMNS, n - 1)[:, None].to(tl.int64)
    word, chunk = tl.arange(0, RUN)[None, None, :], tl.arange(0, TILE)[None, :]
    acc_a = tl.zeros([COLUMNS, TILE, RUN], tl.float32)
    acc_b = tl.zeros([COLUMNS, TILE, RUN], tl.float32)
    for start in range(0, CHUNKS, TILE):
        # Chunks past the end repeat the last: x is zero there.
        base = (tl.minimum(start + chunk, CHUNKS - 1) * RUN)[:, :, None] + word
        words_a = tl.load(codes_ptr + a[:, :, None] * (CHUNKS * RUN) + base)  # [COLUMNS, TILE, RUN]
        words_b = tl.load(codes_ptr + b[:, :, None] * (CHUNKS * RUN) + base)
        for first in tl.static_range(0, PARTS, SHARED):
            group = tl.minimum(((start + chunk) * (RUN * PARTS) + first * RUN) // GROUP, GROUPS - 1) * n
            scale_a, lift_a = _scale_and_lift(scales_ptr, mins_ptr, zeros_ptr, group + a, EXCESS, HAS_MINS, HAS_ZEROS)  # [COLUMNS, TILE, 1]
            scale_b, lift_b = _scale_and_lift(scales_ptr, mins_ptr, zeros_ptr, group + b, EXCESS, HAS_MINS, HAS_ZEROS)
            for part in tl.static_range(first, first + SHARED):
                k = ((start + chunk) * (RUN * PARTS) + part * RUN)[:, :, None] + word + (a * 0)[:, :, None]
                # The same for every column, but loaded for each: so it comes in the layout of the codes, from L1.
                x = widened(tl.load(x_ptr + k, mask=k < K, other=0.0), PTX)
                number_a = code_numbers(words_a, table_ptr, part, KIND, PTX)
                number_b = code_numbers(words_b, table_ptr, part, KIND, PTX)
                if HAS_MINS or HAS_ZEROS or EXCESS != 0:
                    acc_a += x * (number_a * scale_a + lift_a)
                    acc_b += x * (number_b * scale_b + lift_b)
                elif GROUPS == 1:  # the scale is the row's, and waits for its end
                    acc_a += x * number_a
                    acc_b += x * number_b
                else:
                    acc_a += x * (number_a * scale_a)
                    acc_b += x * (number_b * scale_b)
    if GROUPS == 1 and not HAS_MINS and not HAS_ZEROS and EXCESS == 0:
        acc_a *= tl.load(scales_ptr + a).to(tl.float32)[:, :, None]
        acc_b *= tl.load(scales_ptr + b).to(tl.float32)[:, :, None]
    _write(acc_a, place, bias_ptr, out_ptr, n, HAS_BIAS)
    _write(acc_b, place + COLUMNS, bias_ptr, out_ptr, n, HAS_BIAS)


@triton.jit
def _scale_and_lift(scales_ptr, mins_ptr, zeros_ptr, at, EXCESS: tl.constexpr, HAS_MINS: tl.constexpr, HAS_ZEROS: tl.constexpr):
    scale = tl.load(scales_ptr + at).to(tl.float32)
    if HAS_ZEROS:
        lift = (tl.load(zeros_ptr + at).to(tl.float32) - EXCESS) * scale
    else:
        lift = -EXCESS * scale
    if HAS_MINS:
        lift += tl.load(mins_ptr + at).to(tl.float32)
    return scale[:, :, None], lift[:, :, None]


@triton.jit
def _write(acc, place, bias_ptr, out_ptr, n, HAS_BIAS: tl.constexpr):
    out = tl.sum(tl.sum(acc, axis=2), axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + place, mask=place < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=place < n)
