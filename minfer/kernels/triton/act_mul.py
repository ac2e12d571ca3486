"""The gate of a SwiGLU block: out = silu(gate) * up, where a row of x is gate | up.

    grid (T, I / BLOCK); a program reads BLOCK values of gate and of up and writes BLOCK of out

3 T I values move, and some ten operations a value hide behind them. The sigmoid is float32, and like the reference silu is
rounded to the tensor's type before it is multiplied.

For a product of 8-bit rows the result is rounded before it leaves, as in `rms_norm.py`; a program has a whole row then, to know its
largest magnitude.

Left out: other activations, and fusing it into the product before it, which the grouped scales of the quantised ones make awkward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.ops import RoundedRows
from minfer.kernels.triton.checks import power_of_2, row_stride
from minfer.kernels.triton.rounded import empty_rounded, rounding, store_rounded

_BLOCK = 1024
LONGEST = 32768


@triton.jit
def silu_mul_kernel(
    x_ptr, out_ptr, scales_ptr, x_stride, width,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * x_stride + width + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    product = (silu * up.to(tl.float32)).to(gate.dtype)
    if GROUP:
        store_rounded(product, out_ptr, scales_ptr, row, width, GROUP, BLOCK, LARGEST, INTEGER)
    else:
        tl.store(out_ptr + row * width + at, product, mask=inside)


def act_mul(x: torch.Tensor, kind: str) -> torch.Tensor:
    stride = _checked(x, kind)
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        flags = {"BLOCK": _BLOCK, "num_warps": 4, **rounding(out, None)}
        silu_mul_kernel[(rows, triton.cdiv(width, _BLOCK))](x, out, None, stride, width, **flags)
    return out


def act_mul_rounded(x: torch.Tensor, kind: str, dtype: torch.dtype, group: int) -> RoundedRows:
    """`act_mul` whose result, of up to `LONGEST` values a row, is rounded to codes of `dtype` with a scale for each `group` values."""
    stride = _checked(x, kind)
    rows, width = x.shape[0], x.shape[1] // 2
    rounded = empty_rounded(rows, width, dtype, group, x.device)
    if rows:
        block = power_of_2(width)
        flags = {"BLOCK": block, "num_warps": min(16, max(4, block // 1024)), **rounding(rounded.codes, rounded.scales)}
        silu_mul_kernel[(rows, 1)](x, rounded.codes, rounded.scales, stride, width, **flags)
    return rounded


def _checked(x: torch.Tensor, kind: str) -> int:
    if kind != "silu":
        raise ConfigError(f"the triton act_mul knows silu, not {kind!r}")
    stride = row_stride("x", x)
    if x.shape[1] % 2:
        raise ConfigError(f"x must hold a gate and an up value for each output, not {x.shape[1]} values a row")
    return stride
