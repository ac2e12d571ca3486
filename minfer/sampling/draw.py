"""Turning one uniform number per row into a token: the inverse of the cumulative distribution, unfiltered and filtered.

Unfiltered, the sum runs in id order: no sort, and only the block of 64 in which the draw falls is looked at entry by
entry. Filtered, it runs in rank order over the few candidates that `ranking.py` found; top-k, top-p and min-p all keep a
prefix of the ranks, so one sorted list answers all three.

Every sum over a row has an order fixed by the row alone and is in float64 where it decides something, so the token
doesn't depend on the rows beside it. Left out: anything that needs the whole row sorted, except typical-p alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from minfer.sampling.ranking import Ranked, block_sums, gather_block

MIN_TEMPERATURE = 1e-30  # below it, 1 / temperature leaves float32


class Filters(NamedTuple):
    """What a group of rows asks for, each [R] float64 on the logits' device; None where no row of the group asks.

    Rows that don't ask while others do hold what changes nothing: infinity, and 0 for min-p.
    """

    uniform: Tensor  # [0, 1)
    temperature: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    typical_p: Tensor | None

    def take(self, at: Tensor) -> Filters:
        """Those of the rows `at`."""
        asked = [None if values is None else values[at] for values in self[2:]]
        return Filters(self.uniform[at], self.temperature[at], *asked)


def weigh(logits: Tensor, best: Tensor, temperature: Tensor) -> Tensor:
    """Overwrites `logits` [R, V] with exp((logit - best) / temperature) and returns it; `best` [R] is the rows' maximum."""
    scale = (math.log2(math.e) / temperature.clamp(min=MIN_TEMPERATURE)).float()
    return logits.sub_(best[:, None]).mul_(scale[:, None]).exp2_()  # exp2: a third of the time of exp


def draw_by_id(weights: Tensor, uniform: Tensor) -> Tensor:
    """[R] int64: id i with probability weights[r, i] / sum, from float32 weights [R, V] >= 0 and `uniform` [R] float64."""
    sums = block_sums(weights).double().cumsum(-1)  # [R, blocks]
    target = uniform * sums[:, -1]
    block = _invert(sums, target)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside, first = gather_block(weights, block, 0.0)
    return first + _invert(inside.double().cumsum(-1), target - before)


def draw_by_rank(ranked: Ranked, best: Tensor, filters: Filters, mass: Tensor | None) -> tuple[Tensor, Tensor]:
    """[R] int64 tokens among the candidates that pass the filters, and [R] float64: the candidates' weight after top-k.

    `mass` [R] float64 is the weight of which top-p takes its share: that of the whole row, or NaN where top-k comes first
    and the share is of what it left (None: so in all rows). Where the candidates weigh less than top-p of it, some are
    missing and the token is wrong.
    """
    scaled = (ranked.values.double() - best[:, None]) / filters.temperature.clamp(min=MIN_TEMPERATURE)[:, None]
    weights = scaled.exp()
    if filters.top_k is not None:
        weights.masked_fill_(torch.arange(scaled.shape[1], device=scaled.device) >= filters.top_k[:, None], 0.0)
    sums = weights.cumsum(-1)
    if filters.top_p is not None:
        total = sums[:, -1] if mass is None else torch.where(mass.isnan(), sums[:, -1], mass)
        needed = filters.top_p * total
        weights.masked_fill_(_before(sums) >= needed[:, None], 0.0)
    if filters.min_p is not None:
        weights.masked_fill_(weights < filters.min_p[:, None], 0.0)
    if filters.typical_p is not None:
        weights = _keep_typical(weights, scaled, filters.typical_p)
    kept = weights.cumsum(-1)
    picked = _invert(kept, filters.uniform * kept[:, -1])
    return ranked.ids.gather(1, picked[:, None])[:, 0], sums[:, -1]


def _keep_typical(weights: Tensor, scaled: Tensor, typical_p: Tensor) -> Tensor:
    """Keeps the tokens whose information is nearest the distribution's entropy, up to `typical_p` of the mass.

    Locally typical sampling, arXiv 2202.00666; among equally near ones the lower rank goes first.
    """
    total = weights.cumsum(-1)[:, -1:]  # not sum: its order of addition depends on the row's padding
    kept = weights > 0
    information = total.log() - scaled  # -log p
    probability = weights / total
    entropy = torch.where(kept, probability * information, 0.0).cumsum(-1)[:, -1:]
    distance = torch.where(kept, (information - entropy).abs(), torch.inf)
    order = torch.sort(distance, dim=-1, stable=True).indices
    dropped = _before(probability.gather(1, order).cumsum(-1)) >= typical_p[:, None]
    return weights.masked_fill(torch.zeros_like(dropped).scatter_(1, order, dropped), 0.0)


def _before(sums: Tensor) -> Tensor:
    """Cumulative sums without each entry's own part."""
    return torch.nn.functional.pad(sums[:, :-1], (1, 0))


def _invert(sums: Tensor, target: Tensor) -> Tensor:
    """[R] int64: the first entry whose cumulative sum exceeds `target`, and never one of weight zero.

    Where rounding has put the target at or past the end, it is the last entry of positive weight.
    """
    sums = sums.contiguous()
    found = torch.searchsorted(sums, target[:, None].contiguous(), right=True)[:, 0]
    last = torch.searchsorted(sums, sums[:, -1:].contiguous(), right=False)[:, 0]
    return torch.minimum(found, last).clamp(max=sums.shape[1] - 1)
