"""The largest logits of a row without sorting it: what `sample.py` and `logprobs.py` share.

Rank is (logit falling, id rising). Sorting 128k logits to look at fifty of them would move them a dozen times. Instead a row is read once,
by as many programs as it has parts, and what follows is the work of one program on few numbers:

    row         | 64 logits | 64 logits | 64 logits | ...            blocks of neighbours: 2004 of 128256
    maxima        m0          m1          m2                         and sums of exp((x - m) / temperature): 16 KB a row
    blocks        those whose maximum reaches the k-th largest maximum: it is no more than the k-th largest logit
    candidates    their logits from there up, in id order            usually little more than k; at most ROOM, or the row takes their place

A float's bits, the negative ones turned round, are integers in the same order: the key. So "the largest value that at least k candidates
reach" and "at which the mass from there up passes a share" are bisections over integers, each step one reduction. A sum over fixed
lanes never falls when a number is added to it, so these bisections can't be led astray by rounding, as one over running sums could.

-inf is no candidate, and its key, `LEAST`, is below all that are. Both zeros have one key. A block that holds a NaN has the maximum +inf,
which is no more a distribution than a NaN is.

Candidates go through memory, from the threads that find them to all threads of the same program. A barrier orders that: on NVIDIA by
itself, on CDNA because the waves of a program share the L1 that serves them in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 64  # logits; as on the host (`sampling/ranking.py`)
_BLOCK = tl.constexpr(BLOCK)
LEAST = tl.constexpr(-(2**31) + 0x7FFFFF)  # the key of -inf: 0xff800000 with its lower bits turned round
LAST = tl.constexpr(2**31 - 1)  # an id behind all others


@triton.jit
def key_of(x):
    """float32 -> int32 that grows as x does."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def logit_of(key):
    """The inverse, of a key in 64 bits."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def load_blocks(x_ptr, first, width, COUNT: tl.constexpr):
    """COUNT blocks of a row from the `first` on, [COUNT, 64]; -inf behind its end."""
    at = (first + tl.arange(0, COUNT))[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    return at, tl.load(x_ptr + at, mask=at < width, other=float("-inf"))


@triton.jit
def block_maxima(x):
    """[COUNT, 64] -> [COUNT]."""
    missing = tl.max((x != x).to(tl.int32), axis=1) > 0
    return tl.where(missing, float("inf"), tl.max(x, axis=1))


@triton.jit
def block_sums(x, maxima, inverse):
    """Of exp((x - the block's maximum) * inverse)."""
    return tl.sum(tl.exp((x - tl.where(maxima == float("-inf"), 0.0, maxima)[:, None]) * inverse), axis=1)


@triton.jit
def kth_block(maxima, best, k):
    """The largest key that at least k maxima reach, LEAST where there are fewer: a lower bound of the k-th largest logit's."""
    keys = key_of(maxima)
    low, high = tl.full((), LEAST, tl.int64), key_of(best).to(tl.int64) + 1
    while high - low > 1:
        middle = low + (high - low) // 2
        if tl.sum((keys >= middle.to(tl.int32)).to(tl.int32), axis=0) >= k:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def gather_from(x_ptr, maxima, blocks_ptr, values_ptr, ids_ptr, width, least, ROOM: tl.constexpr, TILE: tl.constexpr):
    """Candidates from the key `least` up, and their ids, in id order. Returns how many there are, of which the first ROOM were kept."""
    BLOCKS: tl.constexpr = maxima.shape[0]
    reached = (key_of(maxima) >= least.to(tl.int32)) & (maxima > float("-inf"))
    tl.store(blocks_ptr + tl.cumsum(reached.to(tl.int32), axis=0) - 1, tl.arange(0, BLOCKS), mask=reached)
    blocks = tl.sum(reached.to(tl.int32), axis=0)
    tl.debug_barrier()
    lane = tl.arange(0, TILE)
    count = tl.full((), 0, tl.int32)
    for start in range(0, blocks, TILE // _BLOCK):
        slot = start + lane // _BLOCK
        ids = tl.load(blocks_ptr + slot, mask=slot < blocks, other=0) * _BLOCK + lane % _BLOCK
        x = tl.load(x_ptr + ids, mask=(slot < blocks) & (ids < width), other=float("-inf"))
        keep = (key_of(x) >= least.to(tl.int32)) & (x > float("-inf"))
        place = count + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(values_ptr + place, x, mask=keep & (place < ROOM))
        tl.store(ids_ptr + place, ids, mask=keep & (place < ROOM))
        count += tl.sum(keep.to(tl.int32), axis=0)
    tl.debug_barrier()
    return count


@triton.jit
def count_from(values_ptr, count, least, TILE: tl.constexpr):
    """How many candidates have a key of at least `least`."""
    lanes = tl.zeros([TILE], tl.int32)
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(values_ptr + at, mask=at < count, other=float("-inf"))
        lanes += ((key_of(x) >= least.to(tl.int32)) & (x > float("-inf"))).to(tl.int32)
    return tl.sum(lanes, axis=0)


@triton.jit
def mass_from(values_ptr, count, least, best, inverse, TILE: tl.constexpr):
    """What they weigh: exp((x - best) * inverse), added up."""
    lanes = tl.zeros([TILE], tl.float32)
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(values_ptr + at, mask=at < count, other=float("-inf"))
        lanes += tl.where(key_of(x) >= least.to(tl.int32), tl.exp((x - best) * inverse), 0.0)
    return tl.sum(lanes, axis=0).to(tl.float64)


@triton.jit
def key_by_count(values_ptr, count, wanted, low, high, TILE: tl.constexpr):
    """The largest key above `low` and below `high` that at least `wanted` candidates reach; `low` where there is none."""
    while high - low > 1:
        middle = low + (high - low) // 2
        if count_from(values_ptr, count, middle, TILE) >= wanted:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def key_by_mass(values_ptr, count, wanted, low, high, best, inverse, MORE: tl.constexpr, TILE: tl.constexpr):
    """The same for the mass: at least `wanted`, or MORE than it."""
    while high - low > 1:
        middle = low + (high - low) // 2
        mass = mass_from(values_ptr, count, middle, best, inverse, TILE)
        if MORE:
            enough = mass > wanted
        else:
            enough = mass >= wanted
        if enough:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def nth_of_key(values_ptr, ids_ptr, whole, count, key, turn, TILE: tl.constexpr):
    """The id of the candidate that has `turn` others of its key before it; LAST where there is none. whole: candidates are the row."""
    passed, token = tl.full((), 0, tl.int32), tl.full((), LAST, tl.int32)
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(values_ptr + at, mask=at < count, other=float("-inf"))
        equal = (key_of(x) == key.to(tl.int32)) & (x > float("-inf"))
        here = equal & (passed + tl.cumsum(equal.to(tl.int32), axis=0) - 1 == turn)
        ids = tl.where(whole, at, tl.load(ids_ptr + at, mask=here & (whole == 0), other=0))
        token = tl.minimum(token, tl.min(tl.where(here, ids, LAST), axis=0))
        passed += tl.sum(equal.to(tl.int32), axis=0)
    return token
