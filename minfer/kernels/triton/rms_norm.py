"""RMSNorm with the residual addition in front of it, one program a row.

    h = x + residual                     written once: it is the residual of the next norm
    out = h / sqrt(mean(h^2) + eps) * w

A row (4096 values, 8 KB in bfloat16) fits the registers of one program, so x and residual are read once and h and out are
written once: 4 T H values move, and 4 T H operations are nothing beside that. The kernel is bound by memory, at decode sizes by
its launch; fusing the addition saves one launch and 3 T H values of traffic.

Rounding follows the reference: h to the tensor's type before it is squared, the normalised row once more before the weight.

For a product of 8-bit rows (`linear_w8a8.py`) the result is rounded before it leaves: out is codes then, one byte a value, and scales, a
float32 a row or 128 values. They are, to the bit, those that `quantize_rows` would make of out, which isn't written at all: a launch and
4 T H bytes less of the 8 T H of the two.

Left out: rows beyond 65536 values, which would need a loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.ops import RoundedRows
from minfer.kernels.triton.checks import power_of_2, row_stride, shaped
from minfer.kernels.triton.rounded import empty_rounded, rounding, store_rounded

_MAX_WIDTH = 65536


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    scales_ptr,
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # 0: the result isn't rounded
    LARGEST: tl.constexpr,
    INTEGER: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    h = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0)
    dtype = h.dtype
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + at, mask=inside, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(sum_ptr + row * width + at, h, mask=inside)
    wide = h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    normed = ((wide * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)
    if GROUP:
        store_rounded(normed, out_ptr, scales_ptr, row, width, GROUP, BLOCK, LARGEST, INTEGER)
    else:
        tl.store(out_ptr + row * width + at, normed, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    return _normed(x, weight, eps, residual, torch.empty(x.shape, dtype=x.dtype, device=x.device), None)


def rms_norm_rounded(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, dtype: torch.dtype, group: int
) -> tuple[RoundedRows, torch.Tensor]:
    """`rms_norm` whose first result is rounded to codes of `dtype` with a scale for each `group` values."""
    rounded = empty_rounded(x.shape[0], x.shape[1], dtype, group, x.device)
    return rounded, _normed(x, weight, eps, residual, rounded.codes, rounded.scales)[1]


def _normed(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, out: torch.Tensor, scales: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    if width > _MAX_WIDTH:
        raise ConfigError(f"the triton rms_norm holds a row in registers: it takes up to {_MAX_WIDTH} values, not {width}")
    shaped("weight", weight, width)
    row_stride("weight", weight, x)
    x_stride = row_stride("x", x)
    total, residual_stride = x, 0
    if residual is not None:
        shaped("residual", residual, rows, width)
        residual_stride = row_stride("residual", residual, x)
        total = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        block = power_of_2(width)
        warps = min(16, max(1, block // 512))
        flags = {"HAS_RESIDUAL": residual is not None, "BLOCK": block, "num_warps": warps, **rounding(out, scales)}
        rms_norm_kernel[(rows,)](x, residual, weight, out, total, scales, x_stride, residual_stride, width, eps, **flags)
    return out, total
