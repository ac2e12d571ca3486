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
from minfer.sampling.ranking import block_maxima, block_sums, kth_bound, rank


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Natural logarithms. `rank` counts from 1; `top_token_ids[i]` has rank i + 1 and value `top_logprobs[i]`."""

    token_id: int
    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


def prompt_logprobs(logits: Tensor, targets: Sequence[int], k: int) -> list[RowLogprobs]:
    """Scores known tokens: row i of `logits` [S, V] float32 is where token `targets[i]` followed.

    Takes a few times the memory of `logits`, which stay as they are: callers with long prompts pass a few hundred rows at
    a time. k=0 gives the targets alone.
    """
    return token_logprobs(logits, list(targets), [k] * len(targets))


def token_logprobs(logits: Tensor, tokens: Sequence[int], ks: Sequence[int]) -> list[RowLogprobs]:
    """For each row its token's value and the `ks[i]` best (all, where the vocabulary is smaller)."""
    if not tokens:
        return []
    maxima = block_maxima(logits)
    best = maxima.amax(-1)
    norm = best.double() + block_sums(weigh(logits.clone(), best, torch.ones_like(best, dtype=torch.float64))).double().sum(-1).log()

    token = torch.tensor(tokens, device=logits.device)[:, None]
    chosen = logits.gather(1, token)
    ids = torch.arange(logits.shape[1], device=logits.device)
    ahead = ((logits > chosen) | ((logits == chosen) & (ids < token))).sum(-1)
    value = (chosen.double() - norm[:, None]).float()[:, 0]

    most = min(max(ks), logits.shape[1])
    if most:
        k = torch.full_like(token[:, 0], most)
        ranked = rank(logits, maxima, kth_bound(maxima, k, most))
        top_ids = ranked.ids[:, :most].tolist()
        top_values = (ranked.values[:, :most].double() - norm[:, None]).float().tolist()
    else:
        top_ids = top_values = [[] for _ in tokens]
    rows = zip(tokens, value.tolist(), ahead.tolist(), ks, top_ids, top_values, strict=True)
    return [RowLogprobs(t, v, r + 1, i[:k], w[:k]) for t, v, r, k, i, w in rows]
