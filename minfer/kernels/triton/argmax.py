"""The id of the highest logit, the lowest id where several are equal; one program a row.

The program walks the row in tiles and keeps, lane by lane, the best value so far and where it was: a lane meets its ids in
ascending order, so "strictly greater" keeps the first. At the end the lanes are reduced: the highest value, then the lowest id that has it.

    lanes        0 1 2 ... 4095
    tile 0       a b c           lane j holds ids j, 4096 + j, ...
    tile 1       d e f

S V values are read once. One program reads a row of 128k logits (512 KB) with the bandwidth of one core of the GPU; splitting
rows over programs would be faster below some tens of rows and is left out until it is measured. NaN is never the highest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.kernels.triton.checks import power_of_2, row_stride

_BLOCK = 4096


@triton.jit
def argmax_kernel(x_ptr, out_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = lane
    for start in range(0, width, BLOCK):
        at = start + lane
        value = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=float("-inf")).to(tl.float32)
        better = value > best
        best = tl.where(better, value, best)
        where = tl.where(better, at, where)
    top = tl.max(best, axis=0)
    lowest = tl.min(tl.where(best == top, where, 2147483647), axis=0)
    tl.store(out_ptr + row, lowest.to(tl.int64))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    stride, (rows, width) = row_stride("logits", logits), logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        argmax_kernel[(rows,)](logits, out, stride, width, BLOCK=min(_BLOCK, power_of_2(width)), num_warps=8)
    return out
