"""`Sampler`: one batched call from logits to tokens.

Rows are grouped by what they need, and a group pays for its own needs only: greedy rows share one argmax, rows with a
temperature and no filter share one inverse-CDF draw without any sort, filtered rows share one ranking of a few candidates.
Which group a row is in, and all that is summed for it, depends on its own parameters and logits, never on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minfer.errors import ConfigError
from minfer.sampling.draw import Filters, draw_by_id, draw_by_rank, weigh
from minfer.sampling.logprobs import RowLogprobs, token_logprobs
from minfer.sampling.penalties import Penalties
from minfer.sampling.processors import BadWords, LogitBias, LogitsProcessor, MinTokens, SamplingRow
from minfer.sampling.ranking import block_maxima, block_sums, first_argmax, kth_bound, rank
from minfer.sampling.rng import uniforms
from minfer.sampling_params import SamplingParams

FIRST_CANDIDATES = 64  # what top-p alone looks at first: at usual settings the nucleus is smaller


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """One token per row, its log-probabilities where the row asked, and the rows where nothing could be picked.

    `failed` names rows whose logits, after the masks, hold a NaN or +inf or nothing but -inf: the model or the masks went
    wrong, there is no distribution to draw from. Their `token_ids` entry is 0 and means nothing; the caller ends those
    requests. Other rows are not affected.
    """

    token_ids: list[int]
    logprobs: list[RowLogprobs | None]
    failed: list[int]


class Sampler:
    """Holds the processors and their state for one engine; `vocab_size` is the logits' width.

    `processors` run after the built-in ones, in order, on every call.
    """

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu", processors: Sequence[LogitsProcessor] = ()) -> None:
        if vocab_size < 1:
            raise ConfigError(f"vocab_size must be at least 1, not {vocab_size}")
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.processors: tuple[LogitsProcessor, ...] = (LogitBias(), BadWords(), MinTokens(), Penalties(vocab_size), *processors)

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> SamplerOutput:
        """Picks a token for each row of `logits` [S, V] float32, which is used as working memory and left overwritten.

        Raises `ConfigError` when shape, dtype or device aren't those the sampler was made for.
        """
        self._check(logits, rows)
        if not rows:
            return SamplerOutput([], [], [])
        scored = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
        raw = logits[scored] if scored else None
        for processor in self.processors:
            processor(logits, rows)
        maxima = block_maxima(logits)
        best = maxima.amax(-1)
        usable = best.isfinite()
        tokens = torch.where(usable, self._pick(logits, maxima, best, rows), -1).tolist()
        failed = [index for index, token in enumerate(tokens) if token < 0]
        tokens = [max(token, 0) for token in tokens]
        logprobs: list[RowLogprobs | None] = [None] * len(rows)
        if raw is not None:
            ks = [rows[index].params.logprobs or 0 for index in scored]
            for index, found in zip(scored, token_logprobs(raw, [tokens[index] for index in scored], ks), strict=True):
                logprobs[index] = found
        return SamplerOutput(tokens, logprobs, failed)

    def _pick(self, logits: Tensor, maxima: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """[S] int64; any id at all in rows whose `best` isn't finite. May overwrite `logits`."""
        picked = first_argmax(logits, maxima)  # for all rows: with the maxima at hand it costs next to nothing
        plain: list[int] = []
        filtered: list[int] = []
        for index, row in enumerate(rows):
            if not row.params.greedy:
                (filtered if _filtered(row.params, self.vocab_size) else plain).append(index)
        for group, draw in ((filtered, self._draw_filtered), (plain, self._draw_plain)):
            if len(group) == len(rows):
                picked = draw(logits, maxima, best, rows)
            elif group:
                at = torch.tensor(group, device=logits.device)
                picked[at] = draw(logits[at], maxima[at], best[at], [rows[index] for index in group])
        return picked

    def _draw_plain(self, logits: Tensor, maxima: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        temperature, uniform = self._to_device([[row.params.temperature for row in rows], _uniforms(rows)])
        return draw_by_id(weigh(logits, best, temperature), uniform)

    def _draw_filtered(self, logits: Tensor, maxima: Tensor, best: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        params = [row.params for row in rows]
        top_ks = [p.top_k if 0 < p.top_k < self.vocab_size else 0 for p in params]
        nucleus = [not k and p.top_p < 1 for k, p in zip(top_ks, params, strict=True)]  # top-p of the whole row
        typical = any(p.typical_p < 1 for p in params)
        filters = Filters(
            *self._to_device(
                [
                    [p.temperature for p in params],
                    [k or math.inf for k in top_ks],
                    [p.top_p if p.top_p < 1 else math.inf for p in params],
                    [p.min_p for p in params],
                    [p.typical_p if p.typical_p < 1 else math.inf for p in params],
                    _uniforms(rows),
                ]
            )
        )
        mass = torch.ones_like(filters.temperature)
        if any(nucleus):
            mass = block_sums(weigh(logits.clone(), best, filters.temperature)).double().cumsum(-1)[:, -1]

        bound = _weight_bound(best, filters.temperature, filters.min_p)
        at_least = [k or (FIRST_CANDIDATES if alone else 0) for k, alone in zip(top_ks, nucleus, strict=True)]
        if any(at_least):
            k = torch.tensor(at_least, device=logits.device)
            bound = torch.where(k > 0, kth_bound(maxima, k.clamp(min=1), max(at_least)), bound)
        bound = bound.masked_fill(~best.isfinite(), math.inf)
        picked, enough = draw_by_rank(rank(logits, maxima, bound), best, filters, mass, typical)
        if logits.device.type == "cpu" and any(nucleus):  # elsewhere `rank` leaves nothing out
            at = (~enough & best.isfinite()).nonzero()[:, 0]
            if len(at):
                few = Filters(*(values[at] for values in filters))
                # Tokens below this weight have together less than half of what top-p drops: leaving them out is safe.
                bound = _weight_bound(best[at], few.temperature, (1 - few.top_p) * mass[at] / (2 * self.vocab_size))
                picked[at] = draw_by_rank(rank(logits[at], maxima[at], bound), best[at], few, mass[at], typical)[0]
        return picked

    def _to_device(self, values: list[list[float]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self.device)

    def _check(self, logits: Tensor, rows: Sequence[SamplingRow]) -> None:
        if logits.shape != (len(rows), self.vocab_size) or logits.dtype != torch.float32 or logits.device.type != self.device.type:
            raise ConfigError(
                f"the sampler was made for float32 logits of shape [{len(rows)}, {self.vocab_size}] on {self.device}, "
                f"not {logits.dtype} {list(logits.shape)} on {logits.device}"
            )


def _filtered(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1


def _uniforms(rows: Sequence[SamplingRow]) -> list[float]:
    positions = [len(row.prompt_token_ids) + len(row.output_token_ids) for row in rows]
    return [float(value) for value in uniforms([row.seed for row in rows], positions)]


def _weight_bound(best: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
    """[R] float32: a little below the logit whose exp((logit - best) / temperature) is `weight`; -inf for weight 0."""
    gap = temperature * weight.log()
    return (best.double() + gap - 1e-5 * (1 + best.double().abs() - gap)).float()
