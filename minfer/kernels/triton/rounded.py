"""Rows rounded to 8 bits by the kernel that computes them, for the product that comes next (`linear_w8a8.py`).

A program that holds a whole row knows its largest magnitude, or those of its groups, and can write codes at once; `quantize_rows_kernel`
is for rows that come from elsewhere. Both do the same operations in the same order, so they make the same codes and scales.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.kernels.ops import RoundedRows


def empty_rounded(rows: int, width: int, dtype: torch.dtype, group: int, device: torch.device) -> RoundedRows:
    codes = torch.empty((rows, width), dtype=dtype, device=device)
    return RoundedRows(codes, torch.empty((rows, width // group), dtype=torch.float32, device=device))


def rounding(out: torch.Tensor, scales: torch.Tensor | None) -> dict[str, int | float]:
    """The constants of a kernel that writes `out`: codes where there are scales."""
    if scales is None:
        return {"GROUP": 0, "LARGEST": 1.0, "INTEGER": False}
    integer = out.dtype == torch.int8
    largest = 127.0 if integer else torch.finfo(out.dtype).max
    return {"GROUP": out.shape[1] // scales.shape[1], "LARGEST": largest, "INTEGER": integer}


@triton.jit
def store_rounded(
    x, codes_ptr, scales_ptr, row, width,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    """x [BLOCK], zero from `width` on, as row `row` of the codes and of the scales. A row is one group, or has groups of a power of two."""
    SPAN: tl.constexpr = BLOCK if BLOCK < 2 * GROUP else GROUP
    grouped = tl.reshape(x.to(tl.float32), [BLOCK // SPAN, SPAN])
    scale = tl.max(tl.abs(grouped), axis=1) / LARGEST  # [groups]
    inverse = tl.where(scale > 0.0, 1.0 / tl.maximum(scale, 1e-30), 0.0)
    number = grouped * inverse[:, None]
    if INTEGER:
        number = tl.floor(number + 0.5)
    at, group = tl.arange(0, BLOCK), tl.arange(0, BLOCK // SPAN)
    tl.store(codes_ptr + row * width + at, tl.reshape(number, [BLOCK]).to(codes_ptr.dtype.element_ty), mask=at < width)
    groups = width // GROUP
    tl.store(scales_ptr + row * groups + group, scale, mask=group < groups)
