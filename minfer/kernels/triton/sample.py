"""One token for each row of logits: the most likely one, a draw from all, or a draw from what top-k, top-p and min-p leave.

What a row means is `sampling/draw.py`'s business: top-k, top-p and min-p each keep a prefix of the ranks, and a draw is the first token at
which the running sum of the weights exp((x - best) / temperature) passes u times their total; in id order where nothing is filtered.
No row is sorted. Two launches, the pieces of which `ranks.py` draws:

    blocks_kernel   grid (S, V / 4096)   the maximum of every 64 logits, and their weights' sum where a draw from all or top-p needs it
    draw_kernel     grid (S)             greedy: the block that has the row's maximum, and the place in it
                                         a draw from all: the block in which the running sum passes u x total, and the place in it
                                         filters: candidates, and among them

        ranks                            |--- all keys above ---|-- key, the lowest `ties` ids --|   not kept

Top-k cuts where k candidates are reached, top-p at the key from which the mass up reaches its share, min-p at a weight: three searches
for one key each, and a fourth for the key in which the draw falls. Equal values have equal weights, so how far a prefix reaches
into them, and which of them is drawn, follows from a division.

Which candidates: for top-k what reaches the k-th largest maximum; for min-p what reaches its weight; for top-p alone what reaches a
quarter of the maxima, the best 590 of 128k or so, which hold the nucleus unless the distribution is flat. Where they don't, or are
more than ROOM, the row itself is searched: the same answer, after some seventy passes over it.

Bytes: 4 S V read, once, by all processors together; S V / 8 written and read. Operations: one exponential a logit at most.

The number u is made here: Philox of the request's seed and position (`sampling/rng.py`), to the bit what every other backend makes of them,
so a draw is the token that they draw, but for the rounding of sums. What a row wishes, its seed included, stays the same from step to step;
the positions are mostly those that the model itself was given. So nothing is made or sent for a step whose rows are those of the last one.

Tried: one program a row that reads it three times, maximum, total, candidates (which needs no second launch): compacting candidates is a
running sum over every tile, 1400 instructions for 4096 logits (sm_90), where here only the few blocks that hold candidates pay that.

Left out: typical-p, which the sampler does in torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.triton.checks import index, on_device, power_of_2, row_stride, shaped
from minfer.kernels.triton.ranks import (
    BLOCK,
    LAST,
    LEAST,
    block_maxima,
    block_sums,
    count_from,
    gather_from,
    key_by_count,
    key_by_mass,
    key_of,
    kth_block,
    load_blocks,
    logit_of,
    mass_from,
    nth_of_key,
)

ROOM = 4096  # candidates of a row
TILE = 1024  # of them at a time
BLOCKS_EACH = 64  # what a program of the first launch reads
_BLOCK = tl.constexpr(BLOCK)
_WISHES = tl.constexpr(6)
_FAINTEST = tl.constexpr(1e-37)  # a weight below what float32 holds well is never drawn


@triton.jit
def blocks_kernel(x_ptr, wishes_ptr, maxima_ptr, sums_ptr, x_stride, width, blocks, COUNT: tl.constexpr):
    """maxima, sums: [S, blocks] float32."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * COUNT
    block = first + tl.arange(0, COUNT)
    _, x = load_blocks(x_ptr + row * x_stride, first, width, COUNT)
    maxima = block_maxima(x)
    tl.store(maxima_ptr + row * blocks + block, maxima, mask=block < blocks)
    temperature, top_k, top_p, min_p = _wishes_of(wishes_ptr, row, width)
    if (temperature > 0) & (top_k == 0) & ((top_p < 1) | (min_p == 0)):
        sums = block_sums(x, maxima, _inverse(temperature))
        tl.store(sums_ptr + row * blocks + block, sums, mask=block < blocks)


@triton.jit
def draw_kernel(
    x_ptr, wishes_ptr, positions_ptr, maxima_ptr, sums_ptr, out_ptr, blocks_ptr, values_ptr, ids_ptr, x_stride, width, blocks,
    BLOCKS: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """BLOCKS: `blocks` rounded up to a power of two. blocks_ptr [S, BLOCKS], values_ptr and ids_ptr [S, ROOM] are scratch."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    blocks_ptr += row * BLOCKS
    values_ptr += row * ROOM
    ids_ptr += row * ROOM
    temperature, top_k, top_p, min_p = _wishes_of(wishes_ptr, row, width)
    block = tl.arange(0, BLOCKS)
    maxima = tl.load(maxima_ptr + row * blocks + block, mask=block < blocks, other=float("-inf"))
    best = tl.max(maxima, axis=0)
    if (best == float("-inf")) | (best == float("inf")):
        token = tl.full((), -1, tl.int32)
    elif temperature == 0:
        first = tl.min(tl.where(maxima == best, block, LAST), axis=0)
        at, x = load_blocks(x_ptr, first, width, 1)
        token = tl.min(tl.min(tl.where(x == best, at, LAST), axis=1), axis=0)
    else:
        inverse = _inverse(temperature)
        total, mass = tl.full((), 0, tl.float64), tl.zeros([BLOCKS], tl.float64)
        if (top_k == 0) & ((top_p < 1) | (min_p == 0)):
            sums = tl.load(sums_ptr + row * blocks + block, mask=block < blocks, other=0.0)
            mass = sums.to(tl.float64) * tl.exp((maxima - best) * inverse).to(tl.float64)
            total = tl.sum(mass, axis=0)
        if (top_k > 0) | (top_p < 1) | (min_p > 0):
            least, certain = _least_key(maxima, best, temperature, top_k, top_p, min_p, blocks)
            count = gather_from(x_ptr, maxima, blocks_ptr, values_ptr, ids_ptr, width, least, ROOM, TILE)
            low, whole = tl.maximum(least - 1, LEAST), count > ROOM
            if (certain == 0) & (whole == 0):
                whole = mass_from(values_ptr, count, least, best, inverse, TILE) < top_p * total
            if whole:
                values_ptr, count, low = x_ptr, tl.full((), width, tl.int32), tl.full((), LEAST, tl.int64)
            token = _draw_by_rank(
                values_ptr, ids_ptr, whole, count, low, best, inverse, wishes_ptr, positions_ptr, top_k, top_p, min_p, total, TILE
            )
        else:
            target = uniform_of(wishes_ptr, positions_ptr) * total
            place, before = _passing(mass, target)
            at = place * _BLOCK + tl.arange(0, _BLOCK)
            x = tl.load(x_ptr + at, mask=at < width, other=float("-inf"))
            inside, _ = _passing(tl.exp((x - best) * inverse).to(tl.float64), target - before)
            token = place * _BLOCK + inside
    tl.store(out_ptr + row, token.to(tl.int64))


@triton.jit
def _wishes_of(wishes_ptr, row, width):
    """Temperature, top-k (0: all), top-p, min-p: all but the seed."""
    wishes_ptr += row * _WISHES
    asked_k = tl.load(wishes_ptr + 3)
    top_k = tl.where(asked_k < width, asked_k, 0.0).to(tl.int32)
    return tl.load(wishes_ptr + 2), top_k, tl.load(wishes_ptr + 4), tl.load(wishes_ptr + 5)


@triton.jit
def uniform_of(wishes_ptr, positions_ptr):
    """[0, 1), a multiple of 2^-53, float64: what the token behind the newest one of this program's row is drawn with.

    It is made where it is used, from arguments of the kernel: held till then, even the two pointers would be spilled on sm_90.
    """
    row = tl.program_id(0).to(tl.int64)
    wishes_ptr += row * _WISHES
    seed = tl.load(wishes_ptr).to(tl.uint64) | (tl.load(wishes_ptr + 1).to(tl.uint64) << 32)
    position = tl.load(positions_ptr + row).to(tl.int64) + 1
    zero = tl.full((), 0, tl.int32)
    first, second, _, _ = tl.philox(seed, position.to(tl.int32), (position >> 32).to(tl.int32), zero, zero)
    return ((first.to(tl.uint64) << 21) ^ (second.to(tl.uint64) >> 11)).to(tl.float64) * (2.0**-53)


@triton.jit
def _inverse(temperature):
    return (1.0 / tl.maximum(temperature, 1e-30)).to(tl.float32)


@triton.jit
def _passing(mass, target):
    """The first place at which the running sum exceeds the target, or the last of any mass where rounding put that past the end; and the
    sum before it."""
    place = tl.arange(0, mass.shape[0])
    sums = tl.cumsum(mass, axis=0)
    first = tl.min(tl.where((sums > target) & (mass > 0), place, LAST), axis=0)
    first = tl.minimum(first, tl.max(tl.where(mass > 0, place, 0), axis=0))
    return first, tl.sum(tl.where(place == first, sums - mass, 0.0), axis=0)


@triton.jit
def _least_key(maxima, best, temperature, top_k, top_p, min_p, blocks):
    """The key from which candidates are taken, and whether the filters are certain to keep none below it."""
    least, certain = tl.full((), LEAST, tl.int64), tl.full((), 1, tl.int1)
    if top_k > 0:
        least = kth_block(maxima, best, top_k)
    else:
        if min_p > 0:
            gap, size = tl.maximum(temperature, 1e-30) * tl.log(min_p), tl.abs(best).to(tl.float64)
            bound = best.to(tl.float64) + gap - 1e-5 * (1.0 + size - gap)  # a little below: what is near it is looked at exactly
            least = key_of(bound.to(tl.float32)).to(tl.int64)
        if top_p < 1:
            quarter = kth_block(maxima, best, (blocks + 3) // 4)
            certain = quarter <= least
            least = tl.maximum(quarter, least)
    return least, certain


@triton.jit
def _draw_by_rank(
    values_ptr, ids_ptr, whole, count, key, best, inverse, wishes_ptr, positions_ptr, top_k, top_p, min_p, total, TILE: tl.constexpr
):  # fmt: skip
    """Among the candidates, all of which are above `key`. total: what top-p takes its share of, where there is no top-k.

    From here on kept are the candidates above `key`, and those `ties` at it that have the lowest ids.
    """
    top, ties = key_of(best).to(tl.int64) + 1, tl.full((), 0, tl.int32)
    if top_k > 0:
        key = key_by_count(values_ptr, count, top_k, key, top, TILE)
        ties = top_k - count_from(values_ptr, count, key + 1, TILE)
    if top_p < 1:
        if top_k > 0:
            total = mass_from(values_ptr, count, key + 1, best, inverse, TILE) + ties * _weight(key, best, inverse)
        share = key_by_mass(values_ptr, count, top_p * total, key, top, best, inverse, False, TILE)
        rest = top_p * total - mass_from(values_ptr, count, share + 1, best, inverse, TILE)
        needed = tl.maximum(tl.ceil(rest / tl.maximum(_weight(share, best, inverse), 1e-300)), 1.0)
        needed = tl.minimum(needed, count.to(tl.float64)).to(tl.int32)
        ties = tl.where(share > key, needed, tl.minimum(needed, ties))
        key = share
    least = tl.maximum(min_p, _FAINTEST)
    if _weight(key, best, inverse) < least:
        low, key = key, top - 1
        while key - low > 1:  # the lowest key of enough weight: no candidate has to be looked at
            middle = low + (key - low) // 2
            if _weight(middle, best, inverse) < least:
                low = middle
            else:
                key = middle
        ties = count
    above = mass_from(values_ptr, count, key + 1, best, inverse, TILE)
    ties = tl.minimum(ties, _level(values_ptr, count, key, TILE))
    target = uniform_of(wishes_ptr, positions_ptr) * (above + ties * _weight(key, best, inverse))
    drawn = key_by_mass(values_ptr, count, target, key, top, best, inverse, True, TILE)
    level = tl.where(drawn == key, ties, _level(values_ptr, count, drawn, TILE))
    rest = target - mass_from(values_ptr, count, drawn + 1, best, inverse, TILE)
    turn = tl.floor(rest / tl.maximum(_weight(drawn, best, inverse), 1e-300))
    turn = tl.minimum(tl.maximum(turn, 0.0), (tl.maximum(level, 1) - 1).to(tl.float64)).to(tl.int32)
    return nth_of_key(values_ptr, ids_ptr, whole, count, drawn, turn, TILE)


@triton.jit
def _weight(key, best, inverse):
    """Of one logit with that key, float64."""
    return tl.exp((logit_of(key) - best) * inverse).to(tl.float64)


@triton.jit
def _level(values_ptr, count, key, TILE: tl.constexpr):
    """How many candidates have this key."""
    return count_from(values_ptr, count, key, TILE) - count_from(values_ptr, count, key + 1, TILE)


def sample(logits: torch.Tensor, wishes: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`Ops.sample`: logits[S, V] float32, wishes[S, 6] float64, positions[S] int -> tokens[S] int64; -1 where a row has no distribution."""
    stride, (rows, width) = row_stride("logits", logits), logits.shape
    if logits.dtype != torch.float32 or wishes.dtype != torch.float64 or wishes.shape != (rows, 6) or not wishes.is_contiguous():
        raise ConfigError(f"sample takes float32 logits and float64 wishes [{rows}, 6], not {logits.dtype} and {list(wishes.shape)}")
    shaped("positions", positions, rows)
    index("positions", positions, logits, torch.int32, torch.int64)
    on_device("wishes", wishes, logits)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        blocks = triton.cdiv(width, BLOCK)
        maxima, sums = torch.empty((2, rows, blocks), dtype=torch.float32, device=logits.device)
        scratch, sizes = candidates(rows, blocks, logits.device)
        grid = (rows, triton.cdiv(blocks, BLOCKS_EACH))
        blocks_kernel[grid](logits, wishes, maxima, sums, stride, width, blocks, COUNT=BLOCKS_EACH, num_warps=4)
        draw_kernel[(rows,)](logits, wishes, positions, maxima, sums, out, *scratch, stride, width, blocks, **sizes, num_warps=8)
    return out


def candidates(rows: int, blocks: int, device: torch.device) -> tuple[tuple[torch.Tensor, ...], dict[str, int]]:
    """Scratch for blocks, values and ids of candidates, and its sizes as the kernels want them."""
    sizes = {"BLOCKS": power_of_2(blocks), "ROOM": ROOM, "TILE": TILE}
    kept, ids = (torch.empty((rows, sizes[name]), dtype=torch.int32, device=device) for name in ("BLOCKS", "ROOM"))
    return (kept, torch.empty((rows, ROOM), dtype=torch.float32, device=device), ids), sizes
