"""Rotates q and k and stores k and v, quantised where the cache is, in one launch: all that stands between q, k and v and attention.

Values i and i + D/2 of a head are a pair that turns by the angle of its token's position:

    first' = first cos - second sin,   second' = second cos + first sin        table row: cos (D/2) | sin (D/2)
    slot = block x block_size + offset,   cache[block, head, offset, :] = k'[token, head, :], v[token, head, :]

Where a model norms the heads of q and k first (Qwen3), that is done here too, with the rounding of `rms_norm`: the normalised head to its
type before the weight.

    grid (T, programs of q | of K | of V); a program has some heads of one token

    of q      two tiles [HEADS, D/2], the firsts and the seconds, turned where they lie: whoever reads a value also writes it
    of K, V   a tile [HEADS, D] in the order of channels, since the codes of a row depend on it; K's is read a second time with its
              halves exchanged, out of L1, so that every value meets its partner without a shuffle

2 T (Hq + 2 Hk) D values move and the table's rows, which stay in L2. In a launch each, k was written and read again for storing it, and q
and k for their norms: 2 T Hk D and 2 T (Hq + Hk) D more.
Into a quantised cache (`kv_codes.py`) a row goes as codes and one scale: as many bytes fewer to write, some ten operations a number, and
of fp8 some two hundred: a step's rows are few, and each is written once.

The rotation is float32, each product rounded, then the result to the tensor's type: without norms a slot's bytes are a function of k, v and
the table alone, whatever compiles this. The reference also rounds the cosines to that type. The cache may hold more than 2^31 values:
offsets are 64-bit. A row whose slot is -1 is padding of a captured step; nothing of it is stored.

Tried for K: two halves as q has them, put side by side (`tl.join`). Where D/2 is no power of two the padding would come between the
halves, and the transform's runs and the sums of fp8's search go across it.
Left out: interleaved pairs (i, i + 1) and heads that turn only in part, which no model of ours has; int4 for heads of no power of two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.ops import HeadNorms
from minfer.kernels.reference.kv_quant import SCALES
from minfer.kernels.triton.checks import index, on_device, power_of_2, row_stride, shaped
from minfer.kernels.triton.kv_codes import INT4, PLAIN, kind_of, kv_codes, number_unit, quotients, rotated, row_scale, squared_error
from minfer.kvcache import SCALE_DTYPE, LayerCache

_PAIRS, _TILE = 1024, 2048  # pairs of q a program turns, values of K or V it stores
_INT4, _PLAIN = tl.constexpr(INT4), tl.constexpr(PLAIN)


@triton.jit
def rotary_kv_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, positions_ptr, table_ptr, slots_ptr, q_weight_ptr,
    k_weight_ptr, q_stride, k_stride, v_stride, q_heads, kv_heads, q_programs, kv_programs, eps,
    BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, Q_HEADS: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, LIMIT: tl.constexpr, RUN_STEPS: tl.constexpr, RUN_FACTOR: tl.constexpr, SCALES: tl.constexpr,
    UNIT: tl.constexpr, WIDTH_STEPS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """HALF and WIDTH = 2^WIDTH_STEPS: D/2 and D rounded up to powers of two. Scales and weights are None where there are none."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    angles_ptr = table_ptr + tl.load(positions_ptr + row).to(tl.int64) * DIM
    if part < q_programs:
        _turn(q_ptr + row * q_stride, angles_ptr, q_weight_ptr, part * Q_HEADS, q_heads, eps, DIM, Q_HEADS, HALF, NORM)
    else:
        part -= q_programs
        is_v = part >= kv_programs
        slot = tl.load(slots_ptr + row)
        head = (part % kv_programs) * HEADS + tl.arange(0, HEADS)
        real = (head < kv_heads) & (slot >= 0)
        place = (slot // BLOCK_SIZE * kv_heads + head) * BLOCK_SIZE + slot % BLOCK_SIZE  # [HEADS], rows of the cache
        if is_v:
            cache_ptr = v_cache_ptr
            x = _heads(v_ptr + row * v_stride, head, real, DIM, WIDTH)
        else:
            cache_ptr = k_cache_ptr
            x = _turned(k_ptr + row * k_stride, angles_ptr, k_weight_ptr, head, real, eps, DIM, WIDTH, NORM)
        if KIND == _PLAIN:
            at = tl.arange(0, WIDTH)
            inside = real[:, None] & (at < DIM)[None, :]
            tl.store(cache_ptr + place[:, None] * DIM + at[None, :], x.to(cache_ptr.dtype.element_ty), mask=inside)
        else:
            scale_ptr = k_scale_ptr
            if is_v:
                scale_ptr = v_scale_ptr
            if RUN_STEPS > 0:
                x = rotated(x, RUN_STEPS, RUN_FACTOR)
            _store_codes(x, cache_ptr, scale_ptr, place, real, DIM, HEADS, WIDTH, KIND, LIMIT, SCALES, UNIT, WIDTH_STEPS)


@triton.jit
def _turn(
    x_ptr, angles_ptr, weight_ptr, first_head, heads, eps,
    DIM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Heads of one token in place."""
    head, pair = first_head + tl.arange(0, HEADS), tl.arange(0, HALF)
    half: tl.constexpr = DIM // 2
    cos = tl.load(angles_ptr + pair, mask=pair < half, other=0.0)[None, :]
    sin = tl.load(angles_ptr + half + pair, mask=pair < half, other=0.0)[None, :]
    at = x_ptr + head[:, None] * DIM + pair[None, :]  # [HEADS, HALF]
    inside = (head < heads)[:, None] & (pair < half)[None, :]
    first, second = tl.load(at, mask=inside, other=0.0).to(tl.float32), tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / DIM + eps)
        first = _normed(first, scale, weight_ptr, pair, pair < half, x_ptr.dtype.element_ty)
        second = _normed(second, scale, weight_ptr + half, pair, pair < half, x_ptr.dtype.element_ty)
    tl.store(at, (first * cos - second * sin).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(at + half, (second * cos + first * sin).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _heads(x_ptr, head, real, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The real ones of these heads of one token, [HEADS, WIDTH] float32, zeros behind D."""
    at = tl.arange(0, WIDTH)
    return tl.load(x_ptr + head[:, None] * DIM + at[None, :], mask=real[:, None] & (at < DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _normed(x, scale, weight_ptr, at, inside, DTYPE: tl.constexpr):
    """Heads x [HEADS, W] times their scales [HEADS] and the weights of channels `at`, rounded to DTYPE after each."""
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return ((x * scale[:, None]).to(DTYPE).to(tl.float32) * weight[None, :]).to(DTYPE).to(tl.float32)


@triton.jit
def _turned(x_ptr, angles_ptr, weight_ptr, head, real, eps, DIM: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr):
    """`_heads`, normed, rotated, and rounded to the type that they came in."""
    at, half = tl.arange(0, WIDTH), DIM // 2
    is_first = at < half
    pair, partner_at = tl.where(is_first, at, at - half), tl.where(is_first, at + half, at - half)
    cos = tl.load(angles_ptr + pair, mask=at < DIM, other=0.0)[None, :]
    sin = tl.load(angles_ptr + half + pair, mask=at < DIM, other=0.0)[None, :]
    x = _heads(x_ptr, head, real, DIM, WIDTH)
    partner = tl.load(x_ptr + head[:, None] * DIM + partner_at[None, :], mask=real[:, None] & (at < DIM)[None, :], other=0.0)
    partner = partner.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
        x = _normed(x, scale, weight_ptr, at, at < DIM, x_ptr.dtype.element_ty)
        partner = _normed(partner, scale, weight_ptr, partner_at, at < DIM, x_ptr.dtype.element_ty)
    return (x * cos + partner * tl.where(is_first[None, :], -sin, sin)).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_codes(
    x, cache_ptr, scale_ptr, place, real,
    DIM: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, LIMIT: tl.constexpr, SCALES: tl.constexpr,
    UNIT: tl.constexpr, WIDTH_STEPS: tl.constexpr,
):  # fmt: skip
    """Rows x [HEADS, WIDTH] as codes and scales at rows `place` of the cache; of the scales, so many are tried."""
    at = tl.arange(0, WIDTH)
    inside = real[:, None] & (at < DIM)[None, :]
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
    (rows, q_heads, dim), heads = q.shape, k.shape[1]
    shaped("k", k, rows, heads, dim)
    shaped("v", v, rows, heads, dim)
    shaped("positions", positions, rows)
    shaped("slots", slots, rows)
    index("positions", positions, q, torch.int32, torch.int64)
    index("slots", slots, q, torch.int64)
    if table.dtype != torch.float32 or not table.is_contiguous() or table.shape[1] != dim:
        raise ConfigError(f"the rotary table must be contiguous float32 [positions, {dim}], not {table.dtype} {list(table.shape)}")
    on_device("the rotary table", table, q)
    check_cache(cache, q, heads, dim)
    strides = (row_stride("q", q), row_stride("k", k, q), row_stride("v", v, q))
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    for name, weight in (("q's weight", q_weight), ("k's weight", k_weight)):
        if weight is not None:
            shaped(name, weight, dim)
            row_stride(name, weight, q)
    if not rows:
        return
    half, width = power_of_2(dim // 2), power_of_2(dim)
    q_tile, tile = min(power_of_2(q_heads), max(1, _PAIRS // half)), min(power_of_2(heads), max(1, _TILE // width))
    q_programs, programs = triton.cdiv(q_heads, q_tile), triton.cdiv(heads, tile)
    form, kind = cache.format, kind_of(cache.format)
    run = dim & -dim if form.rotated else 1
    rotary_kv_kernel[(rows, q_programs + 2 * programs)](
        q, k, v, *stored(cache), cache.k_scale, cache.v_scale, positions, table, slots, q_weight, k_weight, *strides,
        q_heads, heads, q_programs, programs, eps,
        BLOCK_SIZE=cache.block_size, DIM=dim, Q_HEADS=q_tile, HALF=half, HEADS=tile, WIDTH=width, KIND=kind, LIMIT=form.limit or 1.0,
        RUN_STEPS=run.bit_length() - 1, RUN_FACTOR=1 / math.sqrt(run), SCALES=len(SCALES) if form.searched else 1,
        UNIT=number_unit(kind), WIDTH_STEPS=width.bit_length() - 1, NORM=norms is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
