"""RMSNorm of each head of q and k in place, before they are rotated (Qwen3), in one launch.

    grid (T, programs of q | programs of k); a program normalises HEADS heads of one token: a tile [HEADS, D], read and written once

2 T (Hq + Hk) D values move. Rounding follows `rms_norm`: the normalised head to its type before the weight.

Left out: doing it inside of `rotary_kv`, which reads the same values; models without such norms would pay for its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.kernels.triton.checks import power_of_2, row_stride, shaped

_TILE = 2048  # values a program normalises


@triton.jit
def qk_norm_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, q_stride, k_stride, q_heads, k_heads, q_programs, eps,
    DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part < q_programs:
        base, weight_ptr, heads, first_head = q_ptr + row * q_stride, q_weight_ptr, q_heads, part * HEADS
    else:
        base, weight_ptr, heads, first_head = k_ptr + row * k_stride, k_weight_ptr, k_heads, (part - q_programs) * HEADS
    head, value = first_head + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    at = base + head[:, None] * DIM + value[None, :]
    inside = (head < heads)[:, None] & (value < DIM)[None, :]
    x = tl.load(at, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / DIM + eps)
    weight = tl.load(weight_ptr + value, mask=value < DIM, other=0.0).to(tl.float32)
    normed = (wide * scale[:, None]).to(x.dtype).to(tl.float32) * weight[None, :]
    tl.store(at, normed.to(x.dtype), mask=inside)


def qk_norm(q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float) -> None:
    (rows, q_heads, dim), k_heads = q.shape, k.shape[1]
    shaped("k", k, rows, k_heads, dim)
    q_stride, k_stride = row_stride("q", q), row_stride("k", k, q)
    for name, weight in (("q's weight", q_weight), ("k's weight", k_weight)):
        shaped(name, weight, dim)
        row_stride(name, weight, q)
    if not rows:
        return
    block = power_of_2(dim)
    heads = min(power_of_2(q_heads), max(1, _TILE // block))
    q_programs, k_programs = triton.cdiv(q_heads, heads), triton.cdiv(k_heads, heads)
    sizes = (q_stride, k_stride, q_heads, k_heads, q_programs, eps)
    qk_norm_kernel[(rows, q_programs + k_programs)](q, k, q_weight, k_weight, *sizes, DIM=dim, HEADS=heads, BLOCK=block, num_warps=4)
