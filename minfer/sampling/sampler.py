"""`Sampler`: one batched call from logits to tokens.

Rows are grouped by what they need, and a group pays for its own needs only: greedy rows share one argmax, rows with a
temperature and no filter share one inverse-CDF draw without any sort, filtered rows share one ranking of a few candidates. Where
the op table has a compiled `sample`, all but typical-p rows go there instead.
Which group a row is in, and all that is summed for it, depends on its own parameters and logits, never on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minfer.errors import ConfigError
from minfer.kernels.fetch import Arrival, fetch
from minfer.sampling.draw import Filters, draw_by_id, draw_by_rank, weigh
from minfer.sampling.logprobs import RowLogprobs, listed_logprobs, token_logprobs
from minfer.sampling.penalties import Penalties
from minfer.sampling.processors import BadWords, LogitBias, LogitsProcessor, MinTokens, SamplingRow
from minfer.sampling.ranking import block_maxima, block_sums, first_argmax, kth_bound, rank
from minfer.sampling.rng import key_words, uniforms
from minfer.sampling_params import SamplingParams

_Rows = Sequence[SamplingRow]
_Draw = Callable[[Tensor, Tensor, Tensor, _Rows], Tensor]  # (logits, block maxima, best, rows) -> ids [R]

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


class Drawn:
    """What was drawn for a batch of rows: on the device at once, on the host when somebody waits for it.

    `tokens` [S] int64 can be given to the next step as they are: where nothing could be picked, some token stands for it.
    """

    def __init__(self, tokens: Tensor, result: Callable[[], SamplerOutput]) -> None:
        self.tokens = tokens
        self._result = result

    def wait(self) -> SamplerOutput:
        """Waits for the device. To be called once."""
        return self._result()


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the parameters of a batch of rows say together. Mostly the same rows come back step after step, and it is found once."""

    rows: _Rows
    plain: bool  # all want the best token
    edits: bool  # some have biases, bans or penalties
    scored: list[int]  # those that want log-probabilities
    wishes: Tensor | None  # [S, 6] float64 for the op table's `sample`, on the device; None where one wants what it hasn't, or all want
    # the best token: drafts make such rows anew each step

    @staticmethod
    def by(rows: _Rows, vocab_size: int, device: torch.device) -> _Asked:
        params = [row.params for row in rows]
        plain, wishes = all(p.plain for p in params), None
        if not plain and all(p.typical_p >= 1 for p in params):
            filters = [(0.0 if p.greedy else p.temperature, _top_k(p, vocab_size), p.top_p, p.min_p) for p in params]
            wanted = [(*key_words(row.seed), *asked) for row, asked in zip(rows, filters, strict=True)]
            wishes = torch.tensor(wanted, dtype=torch.float64).to(device, non_blocking=True)
        return _Asked(
            rows,
            plain=plain,
            edits=any(p.edits for p in params),
            scored=[index for index, p in enumerate(params) if p.logprobs is not None],
            wishes=wishes,
        )


class Sampler:
    """Holds the processors and their state for one engine; `vocab_size` is the logits' width.

    `processors` run after the built-in ones, in order, on every call. `argmax` is the op table's: logits [S, V] -> the lowest
    best ids [S]. `draw` is the op table's `sample`, or None where every draw is composed from torch operations. `fetch` is the op
    table's way of bringing what was drawn to the host. `score` is its `logprobs`, or None where torch computes them when the tokens
    have come.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str = "cpu",
        processors: Sequence[LogitsProcessor] = (),
        argmax: Callable[[Tensor], Tensor] | None = None,
        draw: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        fetch: Callable[..., Arrival] = fetch,
        score: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        if vocab_size < 1:
            raise ConfigError(f"vocab_size must be at least 1, not {vocab_size}")
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.processors: tuple[LogitsProcessor, ...] = (LogitBias(), BadWords(), MinTokens(), Penalties(vocab_size), *processors)
        self._own_processors = tuple(processors)
        self._argmax = argmax
        self._draw = draw
        self._fetch = fetch
        self._score = score
        self._asked = _Asked.by((), vocab_size, self.device)  # in the last call

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: _Rows) -> SamplerOutput:
        """`draw`, and waits for what was drawn."""
        return self.draw(logits, rows).wait()

    def draw(self, logits: Tensor, rows: _Rows, positions: Tensor | None = None) -> Drawn:
        """Picks a token for each row of `logits` [S, V] float32, which is used as working memory and left overwritten.

        `positions` [S] int32: where the newest token of each row stands, one less than `row.position`, if the device has that already.
        To be called in inference mode. Raises `ConfigError` when shape, dtype or device aren't those the sampler was made for.
        """
        self._check(logits, rows)
        if not rows:
            return Drawn(torch.empty(0, dtype=torch.int64, device=logits.device), lambda: SamplerOutput([], [], []))
        if rows != self._asked.rows:  # mostly they are those of the step before
            self._asked = _Asked.by(rows, self.vocab_size, logits.device)
        asked, scored = self._asked, self._asked.scored
        if self._argmax is not None and asked.plain:
            return self._take_the_best(logits, rows, self._argmax)
        raw = _copied(logits, scored) if scored else None
        for processor in self.processors if asked.edits else self._own_processors:
            processor(logits, rows)
        if self._draw is not None and asked.wishes is not None:
            if positions is None:
                newest = torch.tensor([row.position - 1 for row in rows], dtype=torch.int32)
                positions = newest.to(logits.device, non_blocking=True)
            tokens = self._draw(logits, asked.wishes, positions)
        else:
            maxima = block_maxima(logits)
            best = maxima.amax(-1)
            tokens = torch.where(best.isfinite(), self._pick(logits, maxima, best, rows), -1)
        drawn = tokens.clamp(min=0)
        ks = [rows[index].params.logprobs or 0 for index in scored]
        if raw is not None and self._score is not None:
            arrival = self._fetch(tokens, *self._score(raw, _copied(drawn, scored), min(max(ks), self.vocab_size)))
        else:
            arrival = self._fetch(tokens)
        return Drawn(drawn, lambda: _with_logprobs(arrival(), raw, scored, ks, len(rows)))

    def _take_the_best(self, logits: Tensor, rows: _Rows, argmax: Callable[[Tensor], Tensor]) -> Drawn:
        """The usual greedy batch, where at batch 1 every tensor call that can be left out shows in the time of a step."""
        for processor in self._own_processors:
            processor(logits, rows)
        tokens = argmax(logits)
        arrival = self._fetch(tokens, logits.gather(1, tokens[:, None])[:, 0])

        def result() -> SamplerOutput:
            ids, best = arrival()
            failed = [] if math.isfinite(sum(best)) else [index for index, value in enumerate(best) if not math.isfinite(value)]
            return SamplerOutput(ids, [None] * len(ids), failed)

        return Drawn(tokens, result)

    def _pick(self, logits: Tensor, maxima: Tensor, best: Tensor, rows: _Rows) -> Tensor:
        """[S] int64; any id at all in rows whose `best` isn't finite. May overwrite `logits`."""
        groups: dict[_Draw, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(self._draw_for(row.params), []).append(index)
        if len(groups) == 1:
            return next(iter(groups))(logits, maxima, best, rows)
        picked = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for draw, group in groups.items():
            at = torch.tensor(group, device=logits.device)
            picked[at] = draw(logits[at], maxima[at], best[at], [rows[index] for index in group])
        return picked

    def _draw_for(self, params: SamplingParams) -> _Draw:
        if params.greedy:
            return _argmax
        if _top_k(params, self.vocab_size) or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1:
            return _draw_filtered
        return _draw_plain

    def _check(self, logits: Tensor, rows: _Rows) -> None:
        if logits.shape != (len(rows), self.vocab_size) or logits.dtype != torch.float32 or logits.device.type != self.device.type:
            raise ConfigError(
                f"the sampler was made for float32 logits of shape [{len(rows)}, {self.vocab_size}] on {self.device}, "
                f"not {logits.dtype} {list(logits.shape)} on {logits.device}"
            )


def _with_logprobs(arrived: list[Any], raw: Tensor | None, scored: list[int], ks: list[int], count: int) -> SamplerOutput:
    """The tokens with the log-probabilities of the rows `scored`: as they arrived with them, or from those rows' logits as they were."""
    tokens: list[int] = arrived[0]
    failed = [index for index, token in enumerate(tokens) if token < 0]
    tokens = [max(token, 0) for token in tokens] if failed else tokens
    logprobs: list[RowLogprobs | None] = [None] * count
    if raw is not None:
        of_rows = [tokens[index] for index in scored]
        found = token_logprobs(raw, of_rows, ks) if len(arrived) == 1 else listed_logprobs(of_rows, arrived[1], arrived[2], ks)
        for index, one in zip(scored, found, strict=True):
            logprobs[index] = one
    return SamplerOutput(tokens, logprobs, failed)


def _copied(values: Tensor, rows: list[int]) -> Tensor:
    if len(rows) == len(values):
        return values.clone()
    return values[torch.tensor(rows).to(values.device, non_blocking=True)]


def _argmax(logits: Tensor, maxima: Tensor, best: Tensor, rows: _Rows) -> Tensor:
    return first_argmax(logits, maxima)


def _draw_plain(logits: Tensor, maxima: Tensor, best: Tensor, rows: _Rows) -> Tensor:
    temperature, uniform = torch.tensor([[row.params.temperature for row in rows], _uniforms(rows)], dtype=torch.float64).to(logits.device)
    return draw_by_id(weigh(logits, best, temperature), uniform)


def _draw_filtered(logits: Tensor, maxima: Tensor, best: Tensor, rows: _Rows) -> Tensor:
    size = logits.shape[1]
    filters = _filters(rows, size, logits.device)
    nucleus = [row.params.top_p < 1 and not _top_k(row.params, size) for row in rows]  # top-p's share is of the whole row
    mass = None
    if any(nucleus):
        mass = block_sums(weigh(logits.clone(), best, filters.temperature)).double().cumsum(-1)[:, -1]
        if not all(nucleus):
            mass = mass.masked_fill(~torch.tensor(nucleus, device=logits.device), math.nan)
    candidates = rank(logits, maxima, _first_bound(maxima, best, rows, filters, size))
    picked, weight = draw_by_rank(candidates, best, filters, mass)
    if filters.top_p is None or mass is None or logits.device.type != "cpu":  # elsewhere `rank` leaves nothing out
        return picked
    at = (weight < filters.top_p * mass).nonzero()[:, 0]  # the nucleus is larger than the candidates were
    if len(at):
        few = filters.take(at)
        # Tokens below this weight have together less than half of what top-p drops, so leaving them out is safe.
        bound = _weight_bound(best[at], few.temperature, (1 - filters.top_p[at]) * mass[at] / (2 * size))
        picked[at], _ = draw_by_rank(rank(logits[at], maxima[at], bound), best[at], few, mass[at])
    return picked


def _uniforms(rows: _Rows) -> list[float]:
    return uniforms([row.seed for row in rows], [row.position for row in rows]).tolist()  # type: ignore[no-any-return]


def _filters(rows: _Rows, vocab_size: int, device: torch.device) -> Filters:
    params = [row.params for row in rows]
    columns = [
        _uniforms(rows),
        [p.temperature for p in params],
        [_top_k(p, vocab_size) or math.inf for p in params],
        [p.top_p if p.top_p < 1 else math.inf for p in params],
        [p.min_p for p in params],
        [p.typical_p if p.typical_p < 1 else math.inf for p in params],
    ]
    unasked = [None, None, math.inf, math.inf, 0.0, math.inf]
    tensors = torch.tensor(columns, dtype=torch.float64).to(device)
    asked = [any(value != nothing for value in column) for column, nothing in zip(columns, unasked, strict=True)]
    top_k, top_p, min_p, typical_p = (t if wanted else None for t, wanted in zip(tensors[2:], asked[2:], strict=True))
    return Filters(tensors[0], tensors[1], top_k, top_p, min_p, typical_p)


def _first_bound(maxima: Tensor, best: Tensor, rows: _Rows, filters: Filters, size: int) -> Tensor:
    """[R] float32: candidates are the logits from here up. Enough for every filter but top-p alone, where it is a guess."""
    ks = [_top_k(row.params, size) or (FIRST_CANDIDATES if row.params.top_p < 1 else 0) for row in rows]
    if filters.min_p is None:
        bound = torch.full_like(best, -math.inf)
    else:
        bound = _weight_bound(best, filters.temperature, filters.min_p)
    if any(ks):
        k = torch.tensor(ks, device=best.device)
        bound = torch.where(k > 0, kth_bound(maxima, k.clamp(min=1), max(ks)), bound)
    return bound.masked_fill(~best.isfinite(), math.inf)


def _top_k(params: SamplingParams, vocab_size: int) -> int:
    """0 where it filters nothing."""
    return params.top_k if params.top_k < vocab_size else 0


def _weight_bound(best: Tensor, temperature: Tensor, weight: Tensor) -> Tensor:
    """[R] float32: a little below the logit whose exp((logit - best) / temperature) is `weight`; -inf for weight 0."""
    gap = temperature * weight.log()
    return (best.double() + gap - 1e-5 * (1 + best.double().abs() - gap)).float()
