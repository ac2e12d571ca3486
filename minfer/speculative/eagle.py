"""EAGLE as a proposer: the head follows the target's states through its own KV, which lives in blocks numbered like the target's.

Pair t of a sequence is (token t + 1, state t); its KV stands in the slot of token t. After a step that computed tokens up to n - 1
and drew token n, pairs up to n - 1 are known:

    target   0 1 2 ... n-1 | n                 n is drawn, not computed
    pairs    0 1 2 ... n-1                     the last one's output is the first draft
    drafts                   n  n+1 ...        pairs of a draft and the head's own output, overwritten by true ones later

Pairs wait until they are needed, so that one pass brings them in and makes the first draft, and a request that isn't drafted for
costs no more than a copy of its states. Only the newest `LONGEST_WAIT` do: where drafts haven't paid for so long, bringing in all that was
said would cost steps a share of their time for nothing, so the older pairs' slots keep what they held. Prompts are followed at once,
because others may find their blocks in the prefix cache. The last slot of a cached block knows the token after the block of whoever wrote
it last. Such entries are a few of many, and the target checks every draft.

With `top_k` above 1 drafts branch: beside what it draws at a place, the head's next likeliest tokens there. It follows the drawn one
only, so a branch is one token long; for longer ones the head would have to run over branches too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from minfer.runner import HeadRunner, RowSpan
from minfer.sampling import Sampler, SamplingRow
from minfer.scheduler import Request, ScheduledRequest
from minfer.speculative.draft_model import Reserve
from minfer.speculative.policy import Bar
from minfer.speculative.tree import DraftTree, Opinion, Sketch
from minfer.speculative.verify import DraftRow

LONGEST_WAIT = 64  # pairs of a request that wait for its next draft; a pass over so many costs little more than one over a few

Logits = Callable[[torch.Tensor], torch.Tensor]  # [S, H] -> [S, Vd] float32 over the head's ids
Likeliest = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # [S, Vd] -> best [S] and its probability [S], NaN for none
Widen = Callable[[torch.Tensor], torch.Tensor]  # [S, Vd] -> [S, V] over the target's


@dataclass(slots=True)
class _Waiting:
    """Pairs `start`, `start` + 1, ... of a request that are not in the KV yet; by step, the target's states side by side, [T, F * H], and
    which rows are this request's. They are cut out only when they are needed: most requests of most steps end here.
    """

    start: int
    steps: deque[tuple[torch.Tensor, Sequence[int]]] = field(default_factory=deque)
    count: int = 0

    def add(self, states: torch.Tensor, rows: Sequence[int]) -> None:
        self.steps.append((states, rows))
        self.count += len(rows)
        while self.count - len(self.steps[0][1]) >= LONGEST_WAIT:
            forgotten = len(self.steps.popleft()[1])
            self.start, self.count = self.start + forgotten, self.count - forgotten

    def states(self) -> list[torch.Tensor]:
        return [states[rows.start : rows.stop] if isinstance(rows, range) else states[rows] for states, rows in self.steps]


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A request's blocks without its tokens: what the batch builder is told of a pair is all in the span."""

    blocks: list[int]
    token_ids: list[int]
    adapter: int = 0  # adapters are the target's


class EagleProposer:
    """`logits` is the head's own output, or the target's where it has none. `max_tokens`: the most pairs in one pass.

    `token_ids` are those that the logits speak of, None for all.
    """

    tells_chances = True

    def __init__(
        self,
        runner: HeadRunner,
        logits: Logits,
        likeliest: Likeliest,
        widen: Widen,
        token_ids: torch.Tensor | None,
        sampler: Sampler,
        reserve: Reserve,
        max_tokens: int,
        top_k: int,
        after: Sequence[int],
    ) -> None:
        self.after = after
        self._runner = runner
        self._logits, self._likeliest, self._widen = logits, likeliest, widen
        self._token_ids = token_ids
        self._ids = None if token_ids is None else token_ids.tolist()
        self._sampler, self._reserve, self._max_tokens, self._top_k = sampler, reserve, max_tokens, top_k
        self._waiting: dict[Request, _Waiting] = {}

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self._runner.cache.copy_blocks(copies)

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> None:
        known, self._waiting = self._waiting, {}
        side_by_side = torch.cat(list(states), -1)
        for item, own in zip(scheduled, rows, strict=True):
            waiting = known.get(item.request)
            if waiting is None or waiting.start + waiting.count != item.start:
                waiting = _Waiting(item.start)  # new here, or back after a preemption; a cached prefix brought its KV along
            waiting.add(side_by_side, own)
            self._waiting[item.request] = waiting
        prompts = [item.request for item in scheduled if item.start < item.request.num_prompt_tokens]
        if prompts:
            self._bring_in(prompts)

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int] | DraftTree]:
        # The first draft needs no slot, and the last one's is never written.
        room = [self._reserve(request, request.num_tokens + count - 2) for request, count in zip(requests, counts, strict=True)]
        limits = [min(count, held - request.num_tokens + 2) for request, count, held in zip(requests, counts, room, strict=True)]
        sketches = [Sketch(limit, bar) for limit in limits]
        going = [index for index, sketch in enumerate(sketches) if sketch.wants_more]
        if sum(self._waiting[requests[index]].count for index in going) > self._max_tokens:
            self._bring_in([requests[index] for index in going])
        spans, state = self._begin([requests[index] for index in going])
        while going:
            guesses, state = self._runner.run(spans, state)
            self._guess(guesses, [requests[index] for index in going], [sketches[index] for index in going])
            staying = [row for row, index in enumerate(going) if sketches[index].wants_more]
            state = state[staying] if 0 < len(staying) < len(going) else state
            going = [going[row] for row in staying]
            spans = [_next_span(requests[index], sketches[index].drawn) for index in going]
        if self._top_k > 1:
            return [sketch.tree(limit, everywhere=False) for sketch, limit in zip(sketches, limits, strict=True)]
        return [sketch.chain() for sketch in sketches]

    def _begin(self, requests: Sequence[Request]) -> tuple[list[RowSpan], torch.Tensor]:
        """The pass over all that waits, whose last rows make the first drafts."""
        if not requests:
            return [], torch.empty(0)
        spans = [_span(request, self._waiting[request]) for request in requests]
        state = self._runner.states(torch.cat([step for request in requests for step in self._waiting[request].states()]))
        for request in requests:
            self._waiting[request] = _Waiting(request.num_computed_tokens)
        return spans, state

    def _guess(self, guesses: torch.Tensor, requests: Sequence[Request], sketches: Sequence[Sketch]) -> None:
        """Draws each request's next draft from what the head says, [R, H]."""
        logits = self._logits(guesses)
        if self._top_k == 1 and all(request.params.plain and request.params.grammar is None for request in requests):
            self._take_the_best(logits, sketches)
            return
        opinion = Opinion(logits, self._token_ids, self._top_k)
        rows: list[SamplingRow] = [DraftRow(request, sketch.drawn) for request, sketch in zip(requests, sketches, strict=True)]
        sampled = self._sampler.sample(self._widen(logits), rows)
        for row, (token, sketch) in enumerate(zip(sampled.token_ids, sketches, strict=True)):
            if row in sampled.failed:  # a mask left nothing of what the head can say
                sketch.close()
            else:
                sketch.add(opinion.guesses(row, token, rows[row]))

    def _take_the_best(self, logits: torch.Tensor, sketches: Sequence[Sketch]) -> None:
        """What the sampler would draw, without laying the logits out over all ids; a processor of the caller's is left to the check."""
        best, chances = self._likeliest(logits)
        for sketch, at, chance in zip(sketches, best.tolist(), chances.tolist(), strict=True):
            if math.isnan(chance):
                sketch.close()
            else:
                sketch.add([(at if self._ids is None else self._ids[at], chance)])

    @torch.inference_mode()
    def _bring_in(self, requests: Sequence[Request]) -> None:
        """Computes the KV of all waiting pairs of these but the last, which makes the next draft."""
        spans: list[RowSpan] = []
        states: list[torch.Tensor] = []
        size = 0
        for request in requests:
            waiting = self._waiting[request]
            rows = torch.cat(waiting.states())
            tokens, last = _tokens(request, waiting), len(rows) - 1
            at = 0
            while at < last:
                count = min(last - at, self._max_tokens - size)
                spans.append(RowSpan(_Blocks(request.blocks, []), waiting.start + at, count, 0, tokens[at : at + count]))
                states.append(rows[at : at + count])
                at, size = at + count, size + count
                if size == self._max_tokens:
                    self._runner.run(spans, self._runner.states(torch.cat(states)))
                    spans, states, size = [], [], 0
            if last > 0:
                self._waiting[request] = left = _Waiting(waiting.start + last)
                left.add(rows[last:].clone(), range(1))
        if spans:
            self._runner.run(spans, self._runner.states(torch.cat(states)))


def _tokens(request: Request, waiting: _Waiting) -> list[int]:
    return request.token_ids[waiting.start + 1 : waiting.start + 1 + waiting.count]


def _span(request: Request, waiting: _Waiting) -> RowSpan:
    return RowSpan(_Blocks(request.blocks, []), waiting.start, waiting.count, 1, _tokens(request, waiting))


def _next_span(request: Request, drafts: list[int]) -> RowSpan:
    return RowSpan(_Blocks(request.blocks, []), request.num_tokens - 2 + len(drafts), 1, 1, drafts[-1:])
