"""A draft model: a smaller model over the same vocabulary says what it would say next (Leviathan et al., arXiv 2211.17192).

Its KV lives in the same blocks: a block id names a piece of the target's cache and one of the draft's, so prefix sharing,
copy-on-write and preemption need no second book-keeping. It follows the target step by step:

    follow     which of a request's tokens its KV holds: a new request's prefix came with the blocks, rejected drafts are gone
    propose    one pass over what is missing, whose last row gives the first draft, then one pass a draft

A draft is drawn by the sampler from the draft model's logits with the request's own parameters and the random number of that
position, the very one that the target will use: so where the two models agree about the distribution they mostly agree about
the token, also at high temperatures. The draft model can be wrong in any way and costs only time: tokens that it never saw,
because nothing was drafted when a block was filled, make its guesses worse and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minfer.runner import ModelRunner, RowSpan
from minfer.sampling import Sampler, SamplingRow
from minfer.scheduler import Request, ScheduledRequest
from minfer.speculative.policy import Bar
from minfer.speculative.verify import DraftRow

Reserve = Callable[[Request, int], int]  # the scheduler's


class DraftModelProposer:
    """`runner` runs the draft model over its own cache. `max_tokens`: the most tokens that it is given in one pass.

    With `shares_cache` the draft model is the target without some of its layers (Zhang et al., arXiv 2309.08168): the KV of
    what it keeps is the target's own, always complete. What drafts leave in it lies behind the computed tokens, where the
    target writes before it reads, so a wrong one needs no undoing.
    """

    after: Sequence[int] = ()
    tells_chances = False

    def __init__(self, runner: ModelRunner, sampler: Sampler, reserve: Reserve, max_tokens: int, *, shares_cache: bool = False) -> None:
        self._runner = runner
        self._sampler = sampler
        self._reserve = reserve
        self._max_tokens = max_tokens
        self._shares_cache = shares_cache
        self._computed: dict[Request, int] = {}  # tokens of each followed request that the draft's KV holds

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> None:
        if self._shares_cache:
            self._computed = {item.request: item.request.num_computed_tokens for item in scheduled}
            return
        known = self._computed
        # What a step computed anew for the target is missing here; what it found in the cache is not.
        self._computed = {item.request: min(known.get(item.request, item.start), item.request.num_computed_tokens) for item in scheduled}
        # Prompts are followed at once, because others may find their blocks in the prefix cache; the rest when it is needed.
        prompts = [item.request for item in scheduled if item.start < item.request.num_prompt_tokens]
        self._catch_up([(request, request.num_computed_tokens) for request in prompts])

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        # The last draft is not computed here, so a request's KV needs room for its tokens and all drafts but one.
        room = [self._reserve(request, request.num_tokens + count - 1) for request, count in zip(requests, counts, strict=True)]
        limits = [min(count, held - request.num_tokens + 1) for request, count, held in zip(requests, counts, room, strict=True)]
        going = [index for index, limit in enumerate(limits) if limit > 0]
        fits = self._max_tokens // max(1, len(going))
        self._catch_up([(requests[index], requests[index].num_tokens - fits) for index in going])
        spans = [self._first_span(requests[index]) for index in going]
        while going:
            rows: list[SamplingRow] = [DraftRow(requests[index], drafts[index]) for index in going]
            sampled = self._sampler.sample(self._runner.logits(self._runner.run(spans)), rows)
            for index, token in zip(going, sampled.token_ids, strict=True):
                drafts[index].append(token)
            going = [index for index in going if len(drafts[index]) < limits[index]]
            spans = [_next_span(requests[index], drafts[index]) for index in going]
        for index, request in enumerate(requests):
            if drafts[index]:
                self._computed[request] = request.num_tokens + len(drafts[index]) - 1  # cut to what is accepted by `follow`
        return drafts

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        if not self._shares_cache:
            self._runner.cache.copy_blocks(copies)

    def _first_span(self, request: Request) -> RowSpan:
        start = self._computed[request]
        return RowSpan(request, start, request.num_tokens - start, 1)

    @torch.inference_mode()
    def _catch_up(self, targets: Sequence[tuple[Request, int]]) -> None:
        """Computes each request's tokens up to a position, a pass at a time."""
        spans: list[RowSpan] = []
        size = 0
        for request, end in targets:
            start = self._computed[request]
            while start < end:
                count = min(end - start, self._max_tokens - size)
                spans.append(RowSpan(request, start, count, 0))
                start, size = start + count, size + count
                if size == self._max_tokens:
                    self._runner.run(spans)
                    spans, size = [], 0
            self._computed[request] = max(end, self._computed[request])
        if spans:
            self._runner.run(spans)


def _next_span(request: Request, drafts: list[int]) -> RowSpan:
    return RowSpan(request, request.num_tokens - 1 + len(drafts), 1, 1, drafts[-1:])
