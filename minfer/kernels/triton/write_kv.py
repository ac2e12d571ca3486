"""Stores the new tokens' K and V into their slots of the paged cache.

    slot = block x block_size + offset;  cache[block, head, offset, :] = k[token, head, :]

    grid (T, head groups); a program copies a tile [HEADS, D] of K and of V: rows of D values, contiguous on both sides

4 T Hk D values move (K and V read and written), nothing is computed; the cast to the cache's type happens in registers.
Into a quantised cache (`kv_codes.py`) a row goes as codes and one scale: as many bytes fewer to write, some ten operations a number, and
of fp8 some two hundred: a step's rows are few, and each is written once.
The cache may hold more than 2^31 values: offsets are 64-bit. A row whose slot is -1 is padding of a captured step, and written nowhere.

Left out: doing it in the rotary kernel, which would save one launch and one read of K. int4 for heads that are no power of two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.reference.kv_quant import SCALES
from minfer.kernels.triton.checks import index, on_device, power_of_2, row_stride, shaped
from minfer.kernels.triton.kv_codes import INT4, kind_of, kv_codes, number_unit, quotients, rotated, row_scale, squared_error
from minfer.kvcache import SCALE_DTYPE, LayerCache

_TILE = 2048  # values of K a program copies
_INT4 = tl.constexpr(INT4)


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
    slot = tl.load(slots_ptr + row)
    inside = (head < kv_heads)[:, None] & (at < DIM)[None, :] & (slot >= 0)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    source = head[:, None] * DIM + at[None, :]  # [HEADS, DIM_TILE]
    target = ((block * kv_heads + head[:, None]) * BLOCK_SIZE + offset) * DIM + at[None, :]
    k = tl.load(k_ptr + row * k_stride + source, mask=inside)
    v = tl.load(v_ptr + row * v_stride + source, mask=inside)
    tl.store(k_cache_ptr + target, k.to(k_cache_ptr.dtype.element_ty), mask=inside)
    tl.store(v_cache_ptr + target, v.to(v_cache_ptr.dtype.element_ty), mask=inside)


@triton.jit
def write_codes_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, k_stride, v_stride, kv_heads,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, DIM_TILE: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr,
    RUN_STEPS: tl.constexpr, RUN_FACTOR: tl.constexpr, SCALES: tl.constexpr, UNIT: tl.constexpr, WIDTH_STEPS: tl.constexpr,
):  # fmt: skip
    """grid (T, head groups, 2): K or V. 2^RUN_STEPS channels are rotated together; SCALES are tried. DIM_TILE = 2^WIDTH_STEPS."""
    row, is_v = tl.program_id(0).to(tl.int64), tl.program_id(2)
    if is_v == 0:
        x_ptr, cache_ptr, scale_ptr = k_ptr + row * k_stride, k_cache_ptr, k_scale_ptr
    else:
        x_ptr, cache_ptr, scale_ptr = v_ptr + row * v_stride, v_cache_ptr, v_scale_ptr
    head, at = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DIM_TILE)
    slot = tl.load(slots_ptr + row)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    place = (block * kv_heads + head) * BLOCK_SIZE + offset  # [HEADS]
    real = (head < kv_heads) & (slot >= 0)
    inside = real[:, None] & (at < DIM)[None, :]
    x = tl.load(x_ptr + head[:, None] * DIM + at[None, :], mask=inside, other=0.0).to(tl.float32)
    if RUN_STEPS > 0:
        x = rotated(x, RUN_STEPS, RUN_FACTOR)
    bad = tl.sum((x != x).to(tl.int32), axis=1) > 0
    size = tl.abs(x)
    top = tl.max(size, axis=1)
    if KIND == _INT4:
        # The outermost number decides, with its sign; of several the one in the lowest channel.
        first = tl.min(tl.where(size == top[:, None], at[None, :], DIM), axis=1)
        top = -tl.sum(tl.where(at[None, :] == first[:, None], x, 0.0), axis=1)
        scale = row_scale(top, bad, 1.0, LIMIT)
        codes = tl.permute(tl.reshape(kv_codes(quotients(x, scale), KIND, LIMIT), [HEADS, 2, DIM // 2]), [0, 2, 1])
        low, high = tl.split(codes)  # the halves of a row share its bytes
        byte = tl.arange(0, DIM // 2)
        tl.store(cache_ptr + place[:, None] * (DIM // 2) + byte[None, :], low | (high << 4), mask=real[:, None])
    else:
        scale = row_scale(top, bad, 1.0, LIMIT)
        if SCALES > 1:
            best = squared_error(x, scale, KIND, LIMIT, UNIT, WIDTH_STEPS)
            for n in range(1, SCALES):
                wider = row_scale(top, bad, (SCALES + n) * (1.0 / SCALES), LIMIT)
                error = squared_error(x, wider, KIND, LIMIT, UNIT, WIDTH_STEPS)
                better = error < best  # the first of equals; what is not a number is never better
                scale, best = tl.where(better, wider, scale), tl.where(better, error, best)
        tl.store(cache_ptr + place[:, None] * DIM + at[None, :], kv_codes(quotients(x, scale), KIND, LIMIT), mask=inside)
    tl.store(scale_ptr + place, scale.to(scale_ptr.dtype.element_ty), mask=real)


def check_cache(cache: LayerCache, like: torch.Tensor, kv_heads: int, dim: int) -> None:
    """K and V of one layer as the kernels take them: dense [num_blocks, kv_heads, block_size, width] of one format, and its scales."""
    form = cache.format
    if form.packed and dim != power_of_2(dim):
        raise ConfigError(f"the triton kernels keep heads of a power of two in int4, not of {dim}; use kv_cache_dtype int8")
    shape = (cache.k.shape[0], kv_heads, cache.block_size)
    for name, pages, scales in (("cache.k", cache.k, cache.k_scale), ("cache.v", cache.v, cache.v_scale)):
        if pages.dtype != cache.k.dtype:
            raise ConfigError(f"{name} must be {cache.k.dtype} as its companion is, not {pages.dtype}")
        if not pages.is_contiguous() or (scales is not None and not scales.is_contiguous()):
            raise ConfigError(f"{name} must be contiguous, not {list(pages.shape)} by {list(pages.stride())}")
        shaped(name, pages, *shape, form.width(dim))
        on_device(name, pages, like)
        if (scales is not None) != form.scaled or (scales is not None and scales.dtype != SCALE_DTYPE):
            raise ConfigError(f"{name} in {form.name} must {'have bfloat16' if form.scaled else 'not have'} scales")
        if scales is not None:
            shaped(f"scales of {name}", scales, *shape)


def stored(cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as the kernels read them: floats, or plain bytes."""
    if cache.format.scaled:
        return cache.k.view(torch.uint8), cache.v.view(torch.uint8)
    return cache.k, cache.v


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
    meta: dict[str, int | float] = {"BLOCK_SIZE": cache.block_size, "DIM": dim, "HEADS": tile, "DIM_TILE": width, "num_warps": 4}
    pages, programs = stored(cache), triton.cdiv(heads, tile)
    if cache.format.limit is None:
        write_kv_kernel[(rows, programs)](k, v, *pages, slots, *strides, heads, **meta)
        return
    kind, run = kind_of(cache.format), dim & -dim if cache.format.rotated else 1
    meta |= {"KIND": kind, "LIMIT": cache.format.limit}
    meta |= {"RUN_STEPS": run.bit_length() - 1, "RUN_FACTOR": 1 / math.sqrt(run)}
    meta |= {"SCALES": len(SCALES) if cache.format.searched else 1, "UNIT": number_unit(kind), "WIDTH_STEPS": width.bit_length() - 1}
    scales = (cache.k_scale, cache.v_scale)
    write_codes_kernel[(rows, programs, 2)](k, v, *pages, *scales, slots, *strides, heads, enable_fp_fusion=False, **meta)
