"""Stores the new tokens' K and V into their slots of the paged cache.

    slot = block x block_size + offset;  cache[block, head, offset, :] = k[token, head, :]

    grid (T, head groups); a program copies a tile [HEADS, D] of K and of V: rows of D values, contiguous on both sides

4 T Hk D values move (K and V read and written), nothing is computed; the cast to the cache's type happens in registers.
The cache may hold more than 2^31 values: offsets are 64-bit.

Left out: doing it in the rotary kernel, which would save one launch and one read of K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.triton.checks import FLOATS, index, on_device, power_of_2, row_stride, shaped
from minfer.kvcache import LayerCache

_TILE = 2048  # values of K a program copies


@triton.jit
def write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_stride,
    v_stride,
    kv_heads,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, DIM_TILE)
    inside = (head < kv_heads)[:, None] & (at < DIM)[None, :]
    slot = tl.load(slots_ptr + row)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    source = head[:, None] * DIM + at[None, :]  # [HEADS, DIM_TILE]
    target = ((block * kv_heads + head[:, None]) * BLOCK_SIZE + offset) * DIM + at[None, :]
    k = tl.load(k_ptr + row * k_stride + source, mask=inside)
    v = tl.load(v_ptr + row * v_stride + source, mask=inside)
    tl.store(k_cache_ptr + target, k.to(k_cache_ptr.dtype.element_ty), mask=inside)
    tl.store(v_cache_ptr + target, v.to(v_cache_ptr.dtype.element_ty), mask=inside)


def check_cache(cache: LayerCache, like: torch.Tensor, kv_heads: int, dim: int) -> None:
    """K and V of one layer as the kernels take them: dense [num_blocks, kv_heads, block_size, head_dim] floats."""
    for name, pages in (("cache.k", cache.k), ("cache.v", cache.v)):
        if pages.dtype not in FLOATS or pages.dtype != cache.k.dtype:
            raise ConfigError(f"{name} must be float32, bfloat16 or float16 for the triton kernels, not {pages.dtype}")
        if not pages.is_contiguous():
            raise ConfigError(f"{name} must be contiguous, not {list(pages.shape)} by {list(pages.stride())}")
        shaped(name, pages, cache.k.shape[0], kv_heads, cache.block_size, dim)
        on_device(name, pages, like)


def write_kv(k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
    rows, heads, dim = k.shape
    shaped("v", v, rows, heads, dim)
    shaped("slots", slots, rows)
    index("slots", slots, k, torch.int64)
    check_cache(cache, k, heads, dim)
    strides = (row_stride("k", k), row_stride("v", v, k))
    if not rows:
        return
    width = power_of_2(dim)
    tile = min(power_of_2(heads), max(1, _TILE // width))
    meta = {"BLOCK_SIZE": cache.block_size, "DIM": dim, "HEADS": tile, "DIM_TILE": width, "num_warps": 4}
    write_kv_kernel[(rows, triton.cdiv(heads, tile))](k, v, cache.k, cache.v, slots, *strides, heads, **meta)
