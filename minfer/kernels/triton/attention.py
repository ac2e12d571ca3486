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
them. So it is with drafts to verify and with a short chunk of a long prompt, whose tiles are larger: of those, as many as run at once.
The number of splits follows from the number of processors and from the context, about 256 keys a split at least; it depends on
the batch, so outputs may differ in their last bit from one batch to another.

A quantised cache (`kv_codes.py`) has one scale a key and head, which never meets a number of a row: it multiplies the score after
q . code, and the probability before p . code. Rows of fp8 and int4 are rotated: so is q, and the output is turned back (`rotate_kernel`).
The halves of an int4 row share bytes: a score is two products of half the size, and there are two halves of the output.

Bytes: at decode, K and V of every request once, 2 L Hk D values: bound by memory, 4 L Hq D operations. A prompt of n tokens does
2 n^2 Hq D operations on 2 n Hk D values: bound by the matrix units.

Tried (compiled for sm_80, sm_90, gfx90a, gfx942; docs/kernels-gpu.md has the result, nothing was timed): see `_tiles`.

Drafts that branch are requests of one token whose last keys lie elsewhere (`Batch.tails`): where a key lies is all that differs.

A sink (Xiao 2023; gpt-oss has one learned number a head) is a score that every row sees and that no value belongs to. It is added when the
walk is over; where the context is split, to the first part. To begin the walk with it costs registers all along, and spills on sm_80.

A shared prefix. Requests whose block tables begin with the same blocks (`Batch.shared`) read the same keys again and again, each for the
few rows of its own. So a first launch attends to those keys once for all of the batch's tokens, packed into tiles as if they were one
request's (without a mask: what is shared is older than any of them), and a second to the rest; both leave parts, merged as splits are:

           keys ->  |<--- shared, in blocks of all --->|<- own ->|
    r0  t0 h0..h3   |                                  |---------|
    r1  t0 h0..h3   |  one tile of rows, unmasked,     |------|
    r2  t0 h0..h3   |  cut into splits of its own      |------------|

With a window layers attend as ever: what they see of a prefix is short.

Left out: prefixes that only some of a batch's requests share, and more than one prefix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels.triton.attention_kernel import ALL_KEYS, OWN_KEYS, SHARED_KEYS, attention_kernel, merge_kernel
from minfer.kernels.triton.checks import index, power_of_2, row_stride, shaped
from minfer.kernels.triton.kv_codes import PLAIN, kind_of, number_unit, value_unit
from minfer.kernels.triton.rotary_kv import check_cache, stored
from minfer.kernels.triton.rotate import rotate
from minfer.kvcache import LayerCache

_KEYS_PER_SPLIT = 256
_LOG2E = math.log2(math.e)


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


def _splits(programs: int, context: int, processors: int, ptx: bool) -> int:
    """How often to cut the context: until every processor has two programs, on NVIDIA up to four, but no finer than `_KEYS_PER_SPLIT`."""
    wanted = 4 * processors // max(programs, 1) if ptx else -(-2 * processors // max(programs, 1))
    return max(1, min(-(-context // _KEYS_PER_SPLIT), wanted, 128))


def _wide_splits(programs: int, context: int, processors: int, ptx: bool, rows: int, dim_tile: int, kind: int) -> int:
    """The same for tiles of more rows than one token has: as many programs as registers let run at once, and no more.

    A split has four keys a row at least, so that the parts are less to write and read again than K and V are to read.
    """
    together = 1 if rows * dim_tile > 64 * 128 else 3 if ptx and kind == PLAIN else 2
    return max(1, min(context // max(_KEYS_PER_SPLIT, 4 * rows), together * processors // max(programs, 1), 128))


@dataclass(frozen=True)
class _Launch:
    """`attention_kernel` over some of the keys: `tiles` of `rows` query rows, `splits` runs of tiles of `keys` keys."""

    which: int  # ALL_KEYS, SHARED_KEYS, OWN_KEYS
    tiles: int
    rows: int
    keys: int
    splits: int
    options: dict[str, int]


def attention(
    q: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
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
    q_stride = row_stride("q", q)
    check_cache(cache, q, kv_heads, dim)
    for name in ("query_start", "seq_lens", "block_tables"):
        index(name, getattr(batch, name), q, torch.int32)
    if batch.tails is not None:
        index("tails", batch.tails, q, torch.int64)
    if sinks is not None:
        shaped("sinks", sinks, heads)
        index("sinks", sinks, q, torch.float32)
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    kind, width = kind_of(cache.format), cache.format.width(dim)
    read, unit = number_unit(kind), value_unit(kind, q.dtype)
    if cache.format.rotated:
        q, q_stride = rotate(q, q_stride), heads * dim
    group, dim_tile = heads // kv_heads, max(16, power_of_2(width))

    def launch(which: int, queries: int, longest: int, context: int) -> _Launch:
        """Over `context` keys; `queries`: of how many requests, bringing up to `longest` tokens."""
        rows, keys, options = _tiles(group, dim_tile, longest, q.element_size(), kind, shared)
        tokens_each, cut = rows // group, splits
        tiles = tokens // tokens_each + queries
        if cut is None and rows == max(16, power_of_2(group)):
            cut = _splits(kv_heads * (tiles if which == SHARED_KEYS else requests), context, processors, ptx)
        elif cut is None:
            whole = [tokens] if which == SHARED_KEYS else batch.query_lens_host
            busy = min(tiles, sum(-(-new // tokens_each) for new in whole))  # what a graph is captured over brings more than there is
            cut = _wide_splits(kv_heads * busy, context, processors, ptx, rows, dim_tile, kind)
        return _Launch(which, tiles, rows, keys, cut, options)

    longest, context = max(batch.query_lens_host), max(batch.seq_lens_host)
    if window is not None:
        context = min(context, window + longest)
    if batch.shared is None or window is not None:
        launches = [launch(ALL_KEYS, requests, longest, context)]
    else:
        index("shared", batch.shared, q, torch.int32)
        launches = [launch(SHARED_KEYS, 1, tokens, batch.shared_host), launch(OWN_KEYS, requests, longest, context - batch.shared_host)]
    parts, step = sum(each.splits for each in launches), max(each.keys for each in launches)
    partial = lse = None
    if parts > 1:
        partial = torch.empty((tokens, heads, parts, dim), dtype=torch.float32, device=q.device)
        lse = torch.empty((tokens, heads, parts), dtype=torch.float32, device=q.device)
    first_part = 0
    for each in launches:
        tails = None if each.which == SHARED_KEYS else batch.tails
        attention_kernel[(each.tiles, kv_heads, each.splits)](
            q, *stored(cache), cache.k_scale, cache.v_scale, sinks, out, partial, lse, batch.query_start, batch.seq_lens,
            batch.block_tables, tails, None if each.which == ALL_KEYS else batch.shared,
            requests, q_stride, batch.block_tables.stride(0), 0 if tails is None else tails.stride(0), kv_heads,
            window or 0, scale * _LOG2E / read, softcap or 0.0,
            GROUP=group, KIND=kind, PTX=ptx, V_UNIT=unit, V_FACTOR=1 / (read * unit),
            BLOCK_SIZE=cache.block_size, DIM=width, DIM_TILE=dim_tile, BLOCK_M=each.rows, TILE=each.keys, SPLITS=each.splits,
            PARTS=parts, FIRST_PART=first_part, KEYS=each.which, SHARED_STEP=step,
            WINDOW=window is not None, SOFTCAP=softcap is not None, TAILS=tails is not None, SINKS=sinks is not None, **each.options,
        )  # fmt: skip
        first_part += each.splits
    if parts > 1:
        merge = {"DIM": dim, "DIM_TILE": max(16, power_of_2(dim)), "PARTS": parts, "PARTS_TILE": power_of_2(parts), "num_warps": 4}
        merge_kernel[(tokens * heads,)](partial, lse, out, **merge)
    return rotate(out, heads * dim) if cache.format.rotated else out
