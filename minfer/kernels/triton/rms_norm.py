"""RMSNorm with the residual addition in front of it, one program a row.

    h = x + residual                     written once: it is the residual of the next norm
    out = h / sqrt(mean(h^2) + eps) * w

A row (4096 values, 8 KB in bfloat16) fits the registers of one program, so x and residual are read once and h and out are
written once: 4 T H values move, and 4 T H operations are nothing beside that. The kernel is bound by memory, at decode sizes by
its launch; fusing the addition saves one launch and 3 T H values of traffic.

Rounding follows the reference: h to the tensor's type before it is squared, the normalised row once more before the weight.

Left out: quantising the output for an 8-bit product, and rows beyond 65536 values, which would need a loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.triton.checks import power_of_2, row_stride, shaped

_MAX_WIDTH = 65536


@triton.jit
def rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    width,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
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
    normed = (wide * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * width + at, normed.to(dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    if width > _MAX_WIDTH:
        raise ConfigError(f"the triton rms_norm holds a row in registers: it takes up to {_MAX_WIDTH} values, not {width}")
    shaped("weight", weight, width)
    row_stride("weight", weight, x)
    x_stride = row_stride("x", x)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    total, residual_stride = x, 0
    if residual is not None:
        shaped("residual", residual, rows, width)
        residual_stride = row_stride("residual", residual, x)
        total = torch.empty_like(out)
    if rows:
        block = power_of_2(width)
        flags = {"HAS_RESIDUAL": residual is not None, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}
        rms_norm_kernel[(rows,)](x, residual, weight, out, total, x_stride, residual_stride, width, eps, **flags)
    return out, total
