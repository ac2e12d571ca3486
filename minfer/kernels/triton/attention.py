"""Ragged paged attention: prompts, chunks of prompts, single tokens and rows of drafts, in one kernel.

Every request brings some new tokens, the last of its sequence, whose queries look at all of its cached tokens up to their own
position. The kernel is FlashAttention's (Dao 2022): walk over the keys in tiles, keep for each query a running maximum m, a running
sum of exponentials and a running output, and rescale when the maximum grows. Scores never reach memory.

The tile of queries. The G = Hq / Hk query heads that share a KV head read the same keys, so they stand in one tile as extra rows
(a decode step of a model with G = 8 fills half a 16-row matrix instruction instead of a sixteenth):

    rows of a tile, G = 3:   t0h0 t0h1 t0h2 t1h0 t1h1 t1h2 ...        BLOCK_Q = BLOCK_M // G tokens of one request

    grid (query tiles, Hk, splits)

           keys ->  |<- first tile .. every row sees all ->|<- masked ->|
    queries t0..    |  no mask, no bounds: the bulk        |  diagonal  |        window: the left edge is masked too

Which request a query tile belongs to is found on the device, by bisection in query_start: request r owns the tiles from
query_start[r] // BLOCK_Q + r on. That bounds their number by T // BLOCK_Q + R, whatever the lengths are, so the host never has to
know them; the few tiles too many return at once.

Keys come by position: a tile of TILE keys gathers each row through the block table, so tile and block size are independent.

Splits. At decode there are R x Hk query tiles, each walking the whole context: with few requests most of the GPU would idle. Then
the context is cut into `splits` runs of tiles, each program leaves its (output, log-sum-exp) in float32, and `merge_kernel` weighs
them. The number of splits follows from the number of processors and from the context, about 256 keys a split at least; it depends on
the batch, so outputs may differ in their last bit from one batch to another.

Bytes: at decode, K and V of every request once, 2 L Hk D values: bound by memory, 4 L Hq D operations. A prompt of n tokens does
2 n^2 Hq D operations on 2 n Hk D values: bound by the matrix units.

Tried (compiled for sm_80, sm_90, gfx90a, gfx942; docs/kernels-gpu.md has the result, nothing was timed): see `_tiles`.

Left out: attention sinks, tree masks, a shared-prefix form, and a cache in less than 16 bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels.triton.checks import index, power_of_2, row_stride
from minfer.kernels.triton.write_kv import check_cache
from minfer.kvcache import LayerCache

_KEYS_PER_SPLIT = 256
_LOG2E = math.log2(math.e)


@triton.jit
def _attend(
    q,
    acc,
    m,
    norm,
    first_key,
    position,
    seq_len,
    k_base,
    v_base,
    table,
    block_stride,
    window,
    scale,
    softcap,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One tile of keys: q [BLOCK_M, DIM_TILE], position [BLOCK_M] of each row, scale in units of log2."""
    key = first_key + tl.arange(0, TILE)
    at = tl.arange(0, DIM_TILE)
    # An unmasked tile lies within the sequence; past its end the block table and the pool hold anything, NaN included.
    live = key < seq_len
    block = tl.load(table + key // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    offset = block * block_stride + (key % BLOCK_SIZE) * DIM  # [TILE]
    k_at = k_base + offset[None, :] + at[:, None]  # [DIM_TILE, TILE]
    v_at = v_base + offset[:, None] + at[None, :]  # [TILE, DIM_TILE]
    if MASKED:
        k = tl.load(k_at, mask=live[None, :] & (at < DIM)[:, None], other=0.0)
        v = tl.load(v_at, mask=live[:, None] & (at < DIM)[None, :], other=0.0)
    elif DIM_TILE > DIM:
        k = tl.load(k_at, mask=(at < DIM)[:, None], other=0.0)
        v = tl.load(v_at, mask=(at < DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * scale  # [BLOCK_M, TILE]
    if SOFTCAP:  # softcap x tanh(s / softcap), by way of the exponential: tanh(x) = 1 - 2 / (e^2x + 1)
        cap = softcap * 1.4426950408889634
        s = cap * (1.0 - 2.0 / (tl.exp2(s / cap * 2.8853900817779268) + 1.0))
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (position[:, None] - key[None, :] < window)
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1))
    # A row that has seen nothing yet has m = -inf, and -inf - -inf is NaN.
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - finite[:, None])
    shrink = tl.exp2(m - finite)
    norm = norm * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
    return acc, m_new, norm


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    query_start_ptr,
    seq_lens_ptr,
    tables_ptr,
    requests,
    q_stride,
    table_stride,
    kv_heads,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,  # query heads per KV head
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    low = tile * 0  # bisection for the last request whose first tile is not after ours
    high = low + requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle - 1
    start = tl.load(query_start_ptr + low)
    query_len = tl.load(query_start_ptr + low + 1) - start
    first = (tile - (start // BLOCK_Q + low)) * BLOCK_Q  # of this tile's tokens, among the request's new ones
    if first >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + low)
    row = tl.arange(0, BLOCK_M)
    token, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    real = (row < BLOCK_Q * GROUP) & (token < query_len)
    position = seq_len - query_len + token
    at = tl.arange(0, DIM_TILE)
    heads = kv_heads * GROUP
    q_at = q_ptr + (start + token).to(tl.int64)[:, None] * q_stride + head[:, None] * DIM + at[None, :]
    q = tl.load(q_at, mask=real[:, None] & (at < DIM)[None, :], other=0.0)

    first_position = seq_len - query_len + first
    last_position = tl.minimum(first_position + BLOCK_Q, seq_len) - 1
    begin, end = 0, last_position // TILE + 1  # tiles of keys that any row sees
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // TILE
    if SPLITS > 1:
        share = (end - begin + SPLITS - 1) // SPLITS
        begin = begin + split * share
        end = tl.minimum(begin + share, end)
    bulk = begin  # tiles before it need no mask
    if not WINDOW:
        bulk = tl.maximum(tl.minimum((first_position + 1) // TILE, end), begin)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_TILE], tl.float32)
    k_base = k_ptr + kv_head * (BLOCK_SIZE * DIM)
    v_base = v_ptr + kv_head * (BLOCK_SIZE * DIM)
    block_stride = kv_heads * (BLOCK_SIZE * DIM)
    table = tables_ptr + low.to(tl.int64) * table_stride
    for n in range(begin, bulk):
        acc, m, norm = _attend(
            q, acc, m, norm, n * TILE, position, seq_len, k_base, v_base, table, block_stride, window, scale, softcap,
            BLOCK_SIZE, DIM, DIM_TILE, TILE, False, False, SOFTCAP,
        )  # fmt: skip
    for n in range(bulk, end):
        acc, m, norm = _attend(
            q, acc, m, norm, n * TILE, position, seq_len, k_base, v_base, table, block_stride, window, scale, softcap,
            BLOCK_SIZE, DIM, DIM_TILE, TILE, True, WINDOW, SOFTCAP,
        )  # fmt: skip
    empty = norm == 0.0  # rows of padding, and of a split without keys
    norm = tl.where(empty, 1.0, norm)
    out = acc / norm[:, None]
    out_row = (start + token).to(tl.int64) * heads + head  # [BLOCK_M]
    out_mask = real[:, None] & (at < DIM)[None, :]
    if SPLITS > 1:
        place = out_row * SPLITS + split
        tl.store(partial_ptr + place[:, None] * DIM + at[None, :], out, mask=out_mask)
        tl.store(lse_ptr + place, tl.where(empty, float("-inf"), m + tl.log2(norm)), mask=real)
    else:
        tl.store(out_ptr + out_row[:, None] * DIM + at[None, :], out.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def merge_kernel(partial_ptr, lse_ptr, out_ptr, DIM: tl.constexpr, DIM_TILE: tl.constexpr, SPLITS: tl.constexpr, SPLITS_TILE: tl.constexpr):
    """One head of one token: its splits' outputs, weighted by their share of the exponentials. An empty split has lse = -inf."""
    row = tl.program_id(0).to(tl.int64)
    split, at = tl.arange(0, SPLITS_TILE), tl.arange(0, DIM_TILE)
    lse = tl.load(lse_ptr + row * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, axis=0))
    inside = (split < SPLITS)[:, None] & (at < DIM)[None, :]
    partial = tl.load(partial_ptr + (row * SPLITS + split)[:, None] * DIM + at[None, :], mask=inside, other=0.0)
    out = tl.sum(partial * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out_ptr + row * DIM + at, out.to(out_ptr.dtype.element_ty), mask=at < DIM)


def _tiles(group: int, dim_tile: int, wide: bool, itemsize: int) -> tuple[int, int, dict[str, int]]:
    """Rows of queries, keys a tile, and launch settings. `wide`: some request brings more tokens than one narrow tile holds.

    Two stages of K and V tiles must fit shared memory: 2 x 2 x 64 x 128 x 2 bytes is 64 KB, all that AMD's LDS has, so heads of
    more than 64 values get tiles of 32 keys there and everywhere: one table until there is a measurement to justify two.
    """
    narrow = max(16, power_of_2(group))
    rows = max(64, narrow) if wide else narrow
    keys = max(16, 64 * 64 * 2 // (max(dim_tile, 64) * itemsize))
    return rows, keys, {"num_warps": 4 if rows * dim_tile <= 64 * 128 else 8, "num_stages": 2}


def _splits(tiles: int, longest: int, processors: int) -> int:
    """How often to cut the context: until every processor has two programs, but no finer than `_KEYS_PER_SPLIT`."""
    return max(1, min(-(-longest // _KEYS_PER_SPLIT), -(-2 * processors // max(tiles, 1)), 128))


def attention(
    q: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    processors: int,
    splits: int | None = None,
) -> torch.Tensor:
    """`Ops.attention`; `processors` of the device decide how often the context is split, unless `splits` says."""
    tokens, heads, dim = q.shape
    requests, kv_heads = batch.num_requests, cache.k.shape[1]
    if heads % kv_heads:
        raise ConfigError(f"{heads} query heads can't share {kv_heads} KV heads")
    if dim > 256:
        raise ConfigError(f"the triton attention takes heads of up to 256 values, not {dim}")
    q_stride = row_stride("q", q)
    check_cache(cache, q, kv_heads, dim)
    for name in ("query_start", "seq_lens", "block_tables"):
        index(name, getattr(batch, name), q, torch.int32)
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    group, dim_tile = heads // kv_heads, max(16, power_of_2(dim))
    narrow = max(16, power_of_2(group)) // group
    wide = max(batch.query_lens_host) > narrow
    rows, keys, launch = _tiles(group, dim_tile, wide, q.element_size())
    tiles = tokens // (rows // group) + requests
    if splits is None:
        splits = 1 if wide else _splits(requests * kv_heads, max(batch.seq_lens_host), processors)
    partial = lse = None
    if splits > 1:
        partial = torch.empty((tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((tokens, heads, splits), dtype=torch.float32, device=q.device)
    attention_kernel[(tiles, kv_heads, splits)](
        q, cache.k, cache.v, out, partial, lse, batch.query_start, batch.seq_lens, batch.block_tables,
        requests, q_stride, batch.block_tables.stride(0), kv_heads, window or 0, scale * _LOG2E, softcap or 0.0,
        GROUP=group, BLOCK_SIZE=cache.block_size, DIM=dim, DIM_TILE=dim_tile, BLOCK_M=rows, TILE=keys, SPLITS=splits,
        WINDOW=window is not None, SOFTCAP=softcap is not None, **launch,
    )  # fmt: skip
    if splits > 1:
        merge = {"DIM": dim, "DIM_TILE": dim_tile, "SPLITS": splits, "SPLITS_TILE": power_of_2(splits), "num_warps": 4}
        merge_kernel[(tokens * heads,)](partial, lse, out, **merge)
    return out
