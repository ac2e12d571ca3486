"""The gate of a SwiGLU block: out = silu(gate) * up, where a row of x is gate | up.

    grid (T, I / BLOCK); a program reads BLOCK values of gate and of up and writes BLOCK of out

3 T I values move, and some ten operations a value hide behind them. The sigmoid is float32, and like the reference silu is
rounded to the tensor's type before it is multiplied.

Left out: other activations, and fusing it into the product before it, which the grouped scales of the quantised ones make awkward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.triton.checks import row_stride

_BLOCK = 1024


@triton.jit
def silu_mul_kernel(x_ptr, out_ptr, x_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(x_ptr + row * x_stride + at, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * x_stride + width + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + row * width + at, (silu * up.to(tl.float32)).to(gate.dtype), mask=inside)


def act_mul(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind != "silu":
        raise ConfigError(f"the triton act_mul knows silu, not {kind!r}")
    stride, (rows, both) = row_stride("x", x), x.shape
    if both % 2:
        raise ConfigError(f"x must hold a gate and an up value for each output, not {both} values a row")
    out = torch.empty((rows, both // 2), dtype=x.dtype, device=x.device)
    if rows:
        silu_mul_kernel[(rows, triton.cdiv(both // 2, _BLOCK))](x, out, stride, both // 2, BLOCK=_BLOCK, num_warps=4)
    return out
