"""Finding the largest logits of a row without sorting it: greedy's argmax, and the candidates of top-k, top-p and min-p.

The vocabulary is cut into blocks of 64 and one pass takes each block's maximum: a plain streaming read, the cheapest thing
that can be done with all the logits. All else works on those few maxima: the argmax looks inside one block, and the k-th
largest *maximum* is a lower bound of the k-th largest logit, so the blocks that reach it hold all of the top k. What
remains is sorted exactly. Rank means (logit descending, id ascending): bfloat16 models produce equal logits all the time,
and only a total order gives the same answer on every path and device.

Where reading sizes back would stall (GPUs), `rank` sorts the whole row instead; the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 64


class Ranked(NamedTuple):
    """Rows of candidates in rank order: `values` [R, M] float32 padded with -inf, `ids` [R, M] int64."""

    values: Tensor
    ids: Tensor


def block_maxima(logits: Tensor) -> Tensor:
    """[R, V] -> [R, ceil(V / BLOCK)]: the largest of every BLOCK neighbours. A NaN makes its block's maximum NaN."""
    return _per_block(logits, torch.amax)


def block_sums(weights: Tensor) -> Tensor:
    """[R, V] -> [R, ceil(V / BLOCK)]: the sum of every BLOCK neighbours."""
    return _per_block(weights, torch.sum)


def gather_block(values: Tensor, block: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Block `block[i]` of row i: its entries [R, BLOCK], with `fill` past the vocabulary's end, and its first id [R]."""
    first = block * BLOCK
    ids = first[:, None] + torch.arange(BLOCK, device=values.device)
    inside = values.gather(1, ids.clamp(max=values.shape[1] - 1))
    return inside.masked_fill(ids >= values.shape[1], fill), first


def first_argmax(logits: Tensor, maxima: Tensor) -> Tensor:
    """[R] int64: each row's largest logit, the lowest id among equals. `maxima` are the rows' `block_maxima`."""
    inside, first = gather_block(logits, maxima.argmax(-1), -torch.inf)
    return first + inside.argmax(-1)


def kth_bound(maxima: Tensor, k: Tensor, largest_k: int) -> Tensor:
    """[R] float32: a value that at least `k[i]` logits of row i reach; -inf when there are fewer blocks than that."""
    blocks = maxima.shape[1]
    top = maxima.topk(min(largest_k, blocks), dim=-1).values
    bound = top.gather(1, (k - 1).clamp(max=top.shape[1] - 1)[:, None])[:, 0]
    return bound.masked_fill(k > blocks, -torch.inf)


def rank(logits: Tensor, maxima: Tensor, bound: Tensor) -> Ranked:
    """Ranks at least the logits that reach `bound` [R]; a row whose bound is NaN or +inf may come back empty."""
    if logits.device.type != "cpu":
        return Ranked(*torch.sort(logits, dim=-1, descending=True, stable=True))
    rows, ids, values = _reaching(logits, maxima, bound)
    counts = np.bincount(rows, minlength=len(logits))
    keys = np.full((len(logits), max(1, counts.max())), _PADDING, dtype=np.uint64)
    keys[rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]] = _pack(values, ids)
    keys.sort(axis=-1)  # of 64-bit integers: numpy does it with SIMD, ten times faster than a stable sort of floats
    return Ranked(*(torch.from_numpy(part) for part in _unpack(keys)))


def count_ahead(logits: Tensor, maxima: Tensor, tokens: Tensor) -> Tensor:
    """[R] int64: how many of row i's logits rank before that of `tokens[i]`."""
    chosen = logits.gather(1, tokens[:, None])
    if logits.device.type != "cpu":
        ids = torch.arange(logits.shape[1], device=logits.device)
        return ((logits > chosen) | ((logits == chosen) & (ids < tokens[:, None]))).sum(-1)
    rows, candidates, values = _reaching(logits, maxima, chosen[:, 0])
    ahead = (values > chosen.numpy()[rows, 0]) | (candidates < tokens.numpy()[rows])
    return torch.from_numpy(np.bincount(rows[ahead], minlength=len(logits)))


def _reaching(logits: Tensor, maxima: Tensor, bound: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """(row, id, value) of every logit >= its row's bound, by row; on the CPU."""
    rows, blocks = (maxima >= bound[:, None]).nonzero(as_tuple=True)
    size = logits.shape[1]
    width = min(BLOCK, size)
    first = blocks * BLOCK
    start = first.clamp(max=size - width)  # the last window is moved back to end where the vocabulary ends
    values = logits.unfold(1, width, 1)[rows, start]  # [N, width]
    reached = values >= bound[rows, None]
    if size % width:
        reached &= start[:, None] + torch.arange(width) >= first[:, None]  # what moving back repeats
    found = np.flatnonzero(reached.numpy())
    window = found // width
    return rows.numpy()[window], start.numpy()[window] + found % width, values.numpy().ravel()[found]


_SIGN = np.uint32(0x80000000)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def _pack(values: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One integer that grows as the rank does: the float's bits, mapped to falling order, above the id."""
    bits = (values + np.float32(0)).view(np.uint32)  # + 0: -0.0 and 0.0 are equal and must be so here
    falling = np.where(bits & _SIGN, bits, ~(bits | _SIGN))
    keys: NDArray[np.uint64] = (falling.astype(np.uint64) << _HALF) | ids.astype(np.uint64)
    return keys


def _unpack(keys: NDArray[np.uint64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    falling = (keys >> _HALF).astype(np.uint32)
    values = np.where(falling & _SIGN, falling, ~falling & ~_SIGN).view(np.float32)
    ids = (keys & _LOW).astype(np.int64)
    ids[keys == _PADDING] = 0
    return values, ids


_PADDING = _pack(np.array([-np.inf], dtype=np.float32), np.array([0xFFFFFFFF]))[0]  # behind all that is real


def _per_block(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    size = values.shape[1]
    whole = size - size % BLOCK
    parts = []
    if whole:
        parts.append(reduce(values[:, :whole].view(len(values), whole // BLOCK, BLOCK), -1))
    if whole < size:
        parts.append(reduce(values[:, whole:], -1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
