"""Log-probabilities of the raw logits: of the token that was picked (or is given, for prompts) and of the k best.

Raw means before bias, masks, penalties and temperature, as the model said it. Both kinds come from one expression over
one float per row, so a token's value is the same float whether it was picked or listed; and the list is in rank order
(equal logits: lowest id first), so its first entry is greedy's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minfer.sampling.draw import weigh
from minfer.sampling.ranking import block_maxima, block_sums, count_ahead, kth_bound, rank


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Natural logarithms. `rank` counts from 1; `top_token_ids[i]` has rank i + 1 and value `top_logprobs[i]`."""

    token_id: int
    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


@torch.inference_mode()
def prompt_logprobs(logits: Tensor, targets: Sequence[int], k: int) -> list[RowLogprobs]:
    """Scores known tokens: row i of `logits` [S, V] float32 is where token `targets[i]` followed. k=0: the targets alone.

    Overwrites `logits`, so that scoring takes no second copy of them; callers with long prompts pass some rows at a time.
    """
    return token_logprobs(logits, targets, [k] * len(targets))


def token_logprobs(logits: Tensor, tokens: Sequence[int], ks: Sequence[int]) -> list[RowLogprobs]:
    """For each row its token's value and the `ks[i]` best (all, where the vocabulary is smaller); overwrites `logits`."""
    if not tokens:
        return []
    maxima = block_maxima(logits)
    best = maxima.amax(-1)
    token = torch.tensor(tokens, device=logits.device)
    ahead = count_ahead(logits, maxima, token)
    values = logits.gather(1, token[:, None])
    most = min(max(ks), logits.shape[1])
    top_ids = token[:, None][:, :0]
    if most:
        ranked = rank(logits, maxima, kth_bound(maxima, torch.full_like(token, most), most))
        top_ids = ranked.ids[:, :most]
        values = torch.cat((values, ranked.values[:, :most]), -1)
    weights = weigh(logits, best, torch.ones_like(best, dtype=torch.float64))
    norm = best.double() + block_sums(weights).double().cumsum(-1)[:, -1].log()
    found = (values.double() - norm[:, None]).float().tolist()
    rows = zip(tokens, found, ahead.tolist(), ks, top_ids.tolist(), strict=True)
    return [RowLogprobs(token_id, value, place + 1, ids[:k], top[:k]) for token_id, (value, *top), place, k, ids in rows]


def listed_logprobs(
    tokens: Sequence[int], values: Sequence[list[float]], ranks: Sequence[list[int]], ks: Sequence[int]
) -> list[RowLogprobs]:
    """The same from what the op table's `logprobs` found: of each row the token's value and place, and behind them those of the best."""
    rows = zip(tokens, values, ranks, ks, strict=True)
    return [RowLogprobs(token, own, ahead + 1, ids[:k], top[:k]) for token, (own, *top), (ahead, *ids), k in rows]
