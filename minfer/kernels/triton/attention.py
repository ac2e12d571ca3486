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

A quantised cache (`kv_codes.py`) has one scale a key and head, which never meets a number of a row: it multiplies the score after
q . code, and the probability before p . code. Rows of fp8 and int4 are rotated: so is q, and the output is turned back (`rotate_kernel`).
The halves of an int4 row share bytes: a score is two products of half the size, and there are two halves of the output.

Bytes: at decode, K and V of every request once, 2 L Hk D values: bound by memory, 4 L Hq D operations. A prompt of n tokens does
2 n^2 Hq D operations on 2 n Hk D values: bound by the matrix units.

Tried (compiled for sm_80, sm_90, gfx90a, gfx942; docs/kernels-gpu.md has the result, nothing was timed): see `_tiles`.

Left out: attention sinks, tree masks and a shared-prefix form.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels.triton.checks import index, power_of_2, row_stride
from minfer.kernels.triton.kv_codes import INT4, PLAIN, kind_of, kv_numbers, number_unit, rotated, value_unit
from minfer.kernels.triton.write_kv import check_cache, stored
from minfer.kvcache import LayerCache

_KEYS_PER_SPLIT = 256
_LOG2E = math.log2(math.e)
_PLAIN, _INT4 = tl.constexpr(PLAIN), tl.constexpr(INT4)


@triton.jit
def _attend(
    q,
    q_high,
    acc,
    acc_high,
    m,
    norm,
    first_key,
    position,
    seq_len,
    k_base,
    v_base,
    k_scale_base,
    v_scale_base,
    table,
    block_stride,
    window,
    scale,
    softcap,
    KIND: tl.constexpr,
    PTX: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_FACTOR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One tile of keys: q [BLOCK_M, DIM_TILE], position [BLOCK_M] of each row, scale in units of log2. DIM: stored elements a row."""
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
    s = tl.dot(q, kv_numbers(k, KIND, 0, PTX, q.dtype), input_precision="ieee")  # [BLOCK_M, TILE]
    if KIND == _INT4:
        s = tl.dot(q_high, kv_numbers(k, KIND, 1, PTX, q.dtype), s, input_precision="ieee")
    s *= scale
    if KIND != _PLAIN:
        at_scale = block * (block_stride // DIM) + key % BLOCK_SIZE
        s *= tl.load(k_scale_base + at_scale, mask=live, other=0.0).to(tl.float32)[None, :]
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
    if KIND != _PLAIN:
        p *= tl.load(v_scale_base + at_scale, mask=live, other=0.0).to(tl.float32)[None, :] * V_FACTOR
    weight = p.to(q.dtype)
    acc = tl.dot(weight, _small(kv_numbers(v, KIND, 0, PTX, q.dtype), V_UNIT), acc * shrink[:, None], input_precision="ieee")
    if KIND == _INT4:
        acc_high = tl.dot(weight, _small(kv_numbers(v, KIND, 1, PTX, q.dtype), V_UNIT), acc_high * shrink[:, None], input_precision="ieee")
    return acc, acc_high, m_new, norm


@triton.jit
def _small(number, UNIT: tl.constexpr):
    if UNIT != 1.0:
        number = (number * UNIT).to(number.dtype)
    return number


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
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
    KIND: tl.constexpr,
    PTX: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_FACTOR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,  # stored elements a row: of int4 half the head
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
    HEAD: tl.constexpr = 2 * DIM if KIND == _INT4 else DIM
    q_at = q_ptr + (start + token).to(tl.int64)[:, None] * q_stride + head[:, None] * HEAD + at[None, :]
    q = tl.load(q_at, mask=real[:, None] & (at < DIM)[None, :], other=0.0)
    q_high = q
    if KIND == _INT4:
        q_high = tl.load(q_at + DIM, mask=real[:, None] & (at < DIM)[None, :], other=0.0)

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
    if KIND == _INT4:
        acc_high = tl.zeros([BLOCK_M, DIM_TILE], tl.float32)
    else:
        acc_high = 0.0
    k_scale_base = k_scale_ptr
    v_scale_base = v_scale_ptr
    if KIND != _PLAIN:
        k_scale_base += kv_head * BLOCK_SIZE
        v_scale_base += kv_head * BLOCK_SIZE
    k_base = k_ptr + kv_head * (BLOCK_SIZE * DIM)
    v_base = v_ptr + kv_head * (BLOCK_SIZE * DIM)
    block_stride = kv_heads * (BLOCK_SIZE * DIM)
    table = tables_ptr + low.to(tl.int64) * table_stride
    for n in range(begin, bulk):
        acc, acc_high, m, norm = _attend(
            q, q_high, acc, acc_high, m, norm, n * TILE, position, seq_len, k_base, v_base, k_scale_base, v_scale_base, table, block_stride,
            window, scale, softcap, KIND, PTX, V_UNIT, V_FACTOR, BLOCK_SIZE, DIM, DIM_TILE, TILE, False, False, SOFTCAP,
        )  # fmt: skip
    for n in range(bulk, end):
        acc, acc_high, m, norm = _attend(
            q, q_high, acc, acc_high, m, norm, n * TILE, position, seq_len, k_base, v_base, k_scale_base, v_scale_base, table, block_stride,
            window, scale, softcap, KIND, PTX, V_UNIT, V_FACTOR, BLOCK_SIZE, DIM, DIM_TILE, TILE, True, WINDOW, SOFTCAP,
        )  # fmt: skip
    empty = norm == 0.0  # rows of padding, and of a split without keys
    norm = tl.where(empty, 1.0, norm)
    out_row = (start + token).to(tl.int64) * heads + head  # [BLOCK_M]
    out_mask = real[:, None] & (at < DIM)[None, :]
    if SPLITS > 1:
        place = out_row * SPLITS + split
        tl.store(lse_ptr + place, tl.where(empty, float("-inf"), m + tl.log2(norm)), mask=real)
        out_at = partial_ptr + place[:, None] * HEAD + at[None, :]
    else:
        out_at = out_ptr + out_row[:, None] * HEAD + at[None, :]
    tl.store(out_at, (acc / norm[:, None]).to(out_at.dtype.element_ty), mask=out_mask)
    if KIND == _INT4:
        tl.store(out_at + DIM, (acc_high / norm[:, None]).to(out_at.dtype.element_ty), mask=out_mask)


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


@triton.jit
def rotate_kernel(
    x_ptr, out_ptr, x_stride, heads,
    DIM: tl.constexpr, DIM_TILE: tl.constexpr, HEADS: tl.constexpr, STEPS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Rows of DIM numbers times the Walsh-Hadamard matrix: grid (T, head groups)."""
    row, head, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DIM_TILE)
    place = head[:, None] * DIM + at[None, :]
    inside = (head < heads)[:, None] & (at < DIM)[None, :]
    x = rotated(tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(tl.float32), STEPS, FACTOR)
    tl.store(out_ptr + row * (heads * DIM) + place, x.to(out_ptr.dtype.element_ty), mask=inside)


def _rotated(x: torch.Tensor, stride: int) -> torch.Tensor:
    tokens, heads, dim = x.shape
    out = torch.empty((tokens, heads, dim), dtype=x.dtype, device=x.device)
    width, run = power_of_2(dim), dim & -dim
    tile = min(power_of_2(heads), max(1, 2048 // width))
    meta = {"DIM": dim, "DIM_TILE": width, "HEADS": tile, "STEPS": run.bit_length() - 1, "FACTOR": 1 / math.sqrt(run), "num_warps": 4}
    rotate_kernel[(tokens, triton.cdiv(heads, tile))](x, out, stride, heads, **meta)
    return out


def _tiles(group: int, dim_tile: int, longest: int, itemsize: int, kind: int, shared: int) -> tuple[int, int, dict[str, int]]:
    """Rows of queries, keys a tile, and launch settings. `longest`: the most tokens that a request brings. `shared`: bytes a program has.

    Stages of K and V tiles must fit shared memory: 2 x 2 x 64 x 128 x 2 bytes is 64 KB, all that AMD's LDS has, so heads of more than
    64 values get tiles of 32 keys there. Where there is room for three stages of 64, prompts get them, and twice the rows, so that K and V
    come from L2 half as often. Codes take registers to become numbers: two stages of them spill on sm_90 at decode.
    """
    least = max(16, power_of_2(group))
    room = shared >= 200 * 1024 and dim_tile * itemsize == 256  # on sm_80, with 163 KB, they spill
    wide = longest * group > least
    rows = max(least, 128 if room and longest * group > 64 else 64) if wide else least
    keys = max(16, 64 * 64 * 2 // (max(dim_tile, 64) * itemsize))
    if wide and room and rows == 128:
        return rows, 64, {"num_warps": 8, "num_stages": 2 if kind != PLAIN else 3}
    if kind != PLAIN:
        return rows, min(keys, 32), {"num_warps": 4 if rows * dim_tile <= 64 * 128 else 8, "num_stages": 2 if wide else 1}
    return rows, keys, {"num_warps": 4 if rows * dim_tile <= 64 * 128 else 8, "num_stages": 2}


def _splits(programs: int, longest: int, processors: int, ptx: bool) -> int:
    """How often to cut the context: until every processor has two programs, on NVIDIA up to four, but no finer than `_KEYS_PER_SPLIT`."""
    wanted = 4 * processors // max(programs, 1) if ptx else -(-2 * processors // max(programs, 1))
    return max(1, min(-(-longest // _KEYS_PER_SPLIT), wanted, 128))


def attention(
    q: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    processors: int,
    shared: int = 64 * 1024,
    ptx: bool = False,
    splits: int | None = None,
) -> torch.Tensor:
    """`Ops.attention`; `processors` of the device decide how often the context is split, unless `splits` says. ptx: of NVIDIA.

    `shared`: bytes of shared memory that a program may have there.
    """
    tokens, heads, dim = q.shape
    requests, kv_heads = batch.num_requests, cache.k.shape[1]
    if heads % kv_heads:
        raise ConfigError(f"{heads} query heads can't share {kv_heads} KV heads")
    if dim > 256:
        raise ConfigError(f"the triton attention takes heads of up to 256 values, not {dim}")
    if batch.tails is not None:
        raise ConfigError("the triton attention doesn't know drafts that branch; set draft_top_k to 1")
    q_stride = row_stride("q", q)
    check_cache(cache, q, kv_heads, dim)
    for name in ("query_start", "seq_lens", "block_tables"):
        index(name, getattr(batch, name), q, torch.int32)
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    kind, width = kind_of(cache.format), cache.format.width(dim)
    read, unit = number_unit(kind), value_unit(kind, q.dtype)
    if cache.format.rotated:
        q, q_stride = _rotated(q, q_stride), heads * dim
    group, dim_tile = heads // kv_heads, max(16, power_of_2(width))
    rows, keys, launch = _tiles(group, dim_tile, max(batch.query_lens_host), q.element_size(), kind, shared)
    tiles = tokens // (rows // group) + requests
    if splits is None:
        splits = 1 if rows > max(16, power_of_2(group)) else _splits(requests * kv_heads, max(batch.seq_lens_host), processors, ptx)
    partial = lse = None
    if splits > 1:
        partial = torch.empty((tokens, heads, splits, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((tokens, heads, splits), dtype=torch.float32, device=q.device)
    attention_kernel[(tiles, kv_heads, splits)](
        q, *stored(cache), cache.k_scale, cache.v_scale, out, partial, lse, batch.query_start, batch.seq_lens, batch.block_tables,
        requests, q_stride, batch.block_tables.stride(0), kv_heads, window or 0, scale * _LOG2E / read, softcap or 0.0,
        GROUP=group, KIND=kind, PTX=ptx, V_UNIT=unit, V_FACTOR=1 / (read * unit),
        BLOCK_SIZE=cache.block_size, DIM=width, DIM_TILE=dim_tile, BLOCK_M=rows, TILE=keys, SPLITS=splits,
        WINDOW=window is not None, SOFTCAP=softcap is not None, **launch,
    )  # fmt: skip
    if splits > 1:
        merge = {"DIM": dim, "DIM_TILE": max(16, power_of_2(dim)), "SPLITS": splits, "SPLITS_TILE": power_of_2(splits), "num_warps": 4}
        merge_kernel[(tokens * heads,)](partial, lse, out, **merge)
    return _rotated(out, heads * dim) if cache.format.rotated else out
