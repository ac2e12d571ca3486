"""The small ops of the reference backend. Arithmetic is float32 where rounding order matters, as in transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minfer.kernels.ops import HeadNorms
from minfer.kernels.reference.kv_quant import quantize
from minfer.kvcache import LayerCache


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    h = x if residual is None else x + residual  # [T, H]
    wide = h.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(h.dtype) * weight, h  # Llama rounds before it multiplies by the weight


def qk_norm(q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float) -> None:
    for heads, weight in ((q, q_weight), (k, k_weight)):
        heads.copy_(rms_norm(heads, weight, eps)[0])


def rotary(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
    cos, sin = table[positions][:, None, :].to(q.dtype).chunk(2, dim=-1)  # [T, 1, D/2] each
    for x in (q, k):
        first, second = x.chunk(2, dim=-1)
        x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
    block, offset = slots // cache.block_size, slots % cache.block_size
    for rows, pages, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        if scales is None:
            pages[block, :, offset] = rows.to(pages.dtype)  # [T, Hk, D] into [num_blocks, Hk, block_size, D]
        else:
            codes, scale = quantize(rows, cache.format)
            pages.view(torch.uint8)[block, :, offset] = codes.view(torch.uint8)  # torch doesn't index 8-bit floats
            scales[block, :, offset] = scale


def rotary_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    cache: LayerCache,
    slots: torch.Tensor,
    norms: HeadNorms | None = None,
) -> None:
    if norms is not None:
        qk_norm(q, k, *norms)
    rotary(q, k, positions, table)
    write_kv(k, v, cache, slots)


def act_mul(x: torch.Tensor, kind: str) -> torch.Tensor:
    if kind != "silu":
        raise NotImplementedError(f"act_mul knows silu, not {kind!r}")
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def argmax(logits: torch.Tensor) -> torch.Tensor:
    # torch.argmax leaves open which of several maxima it returns on some devices; max over equality does not.
    best = logits.amax(dim=-1, keepdim=True)
    return (logits == best).to(torch.uint8).argmax(dim=-1) if logits.is_cuda else logits.argmax(dim=-1)
