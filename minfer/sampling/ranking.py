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

import torch
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
    counts = torch.bincount(rows, minlength=len(logits))
    column = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    width = max(1, int(counts.max()))
    padded = torch.full((len(logits), width), -torch.inf)
    padded_ids = torch.zeros(padded.shape, dtype=torch.int64)
    padded[rows, column] = values
    padded_ids[rows, column] = ids
    ordered, order = torch.sort(padded, dim=-1, descending=True, stable=True)  # stable: equal logits stay in id order
    return Ranked(ordered, padded_ids.gather(1, order))


def _reaching(logits: Tensor, maxima: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, id, value) of every logit >= its row's bound, by row and then id."""
    rows, blocks = (maxima >= bound[:, None]).nonzero(as_tuple=True)
    ids = blocks[:, None] * BLOCK + torch.arange(BLOCK)  # [N, BLOCK]
    inside = ids < logits.shape[1]
    values = logits[rows[:, None], ids.clamp(max=logits.shape[1] - 1)]
    entry, offset = ((values >= bound[rows][:, None]) & inside).nonzero(as_tuple=True)
    return rows[entry], ids[entry, offset], values[entry, offset]


def _per_block(values: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    size = values.shape[1]
    whole = size - size % BLOCK
    parts = []
    if whole:
        parts.append(reduce(values[:, :whole].view(len(values), whole // BLOCK, BLOCK), -1))
    if whole < size:
        parts.append(reduce(values[:, whole:], -1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
