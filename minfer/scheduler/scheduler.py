"""The scheduler: shares one token budget between requests, step by step.

There is no prefill mode and no decode mode. Every request has some tokens left to compute, and each step hands out at most
`max_num_batched_tokens` of them:

    1. Every running request, in policy order, gets as many of its tokens as the budget allows, but one token is kept back
       for each request behind it. So a long prompt takes what is over, and nobody who is generating misses a step.
    2. If nobody had to be preempted, waiting requests are admitted in the same order, as long as the blocks for all their
       tokens are free. A prefix that is cached is not computed again.

A request that has drafts (guesses of its next tokens, see `speculative/`) is a request with more tokens to compute: it brings
as many as budget and blocks have over after everyone's own. Chunked prefill, mixing prompts with generation, prefix hits and
drafts are all this one rule.

A step is decided from what is known when it is decided, which may be before the step ahead of it has brought its tokens: a request is
moved on when it is scheduled, and `update` brings the tokens themselves, one or two calls of `schedule` later. The device runs
the steps in order, so blocks that are released may be given away at once, also while a step that reads them is under way.

When blocks run out, the last request in policy order is preempted: its blocks are released, its tokens are kept, and it
goes back to its place in the queue to be recomputed (usually from the prefix cache, if its blocks have not been taken). That
costs compute but never memory, and needs no second path through the model. The first request in order is never preempted
for another, so it always finishes: there is no starvation and no deadlock.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from minfer.scheduler.block_pool import BlockPool
from minfer.scheduler.policies import Policy
from minfer.scheduler.prefix_cache import PrefixCache
from minfer.scheduler.request import FinishReason, Request, RequestStatus


@dataclass(slots=True)
class ScheduledRequest:
    """`num_new_tokens` of a request's tokens, from `start`, to go through the model in this step; `drafts` are the last of them.

    `parents[i]` is the draft, from 1, that draft i + 1 follows, or 0 for the newest token, and comes before it; () where each follows the
    one before. Known once the step has run: `kept`, those that turned out right, and `drawn`, the tokens that the request got.
    """

    request: Request
    start: int
    num_new_tokens: int
    samples: bool  # whether the logits of the request's last token are there, and give the next one
    drafts: Sequence[int] = ()
    parents: Sequence[int] = ()
    kept: Sequence[int] = ()
    drawn: Sequence[int] = ()

    @property
    def completes_prompt(self) -> bool:
        """Whether they are the last of the prompt."""
        return self.start + self.num_new_tokens == self.request.num_prompt_tokens

    @property
    def decodes(self) -> bool:
        """Whether they are the request's newest token and its drafts, and nothing that a prompt has left over."""
        return self.samples and self.num_new_tokens == 1 + len(self.drafts)


@dataclass(slots=True)
class SchedulerOutput:
    """The decision of one step. `copies` are blocks to copy, (from, to), before the model runs.

    `one_each`: every request has one token to compute, its newest, which gives the next; most steps are so.
    """

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    one_each: bool = True
    copies: list[tuple[int, int]] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(s.num_new_tokens for s in self.scheduled)


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start: what each technique did, independent of the clock."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_adapter_tokens: int = 0  # of those, with a LoRA adapter
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # prompt tokens looked up
    num_prefix_hits: int = 0  # prompt tokens found
    num_forked_tokens: int = 0  # prompt tokens shared with a sibling
    num_copied_blocks: int = 0


class Scheduler:
    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: Policy,
        max_prefill_chunk: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.block_size = block_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_prefill_chunk = max_prefill_chunk or max_num_batched_tokens
        self.policy = policy
        self.prefix_cache = PrefixCache(block_size) if prefix_caching else None
        self.pool = BlockPool(num_blocks, self.prefix_cache.forget if self.prefix_cache is not None else lambda block: None)
        self.running: list[Request] = []  # in policy order
        self.stats = SchedulerStats()
        self._waiting: list[tuple[tuple[int, ...], Request]] = []  # a heap in policy order; finished ones linger until popped
        self._num_waiting = 0

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def adapters(self) -> tuple[list[int], list[int]]:
        """Numbers of the LoRA adapters of running and of waiting requests. Any thread may ask: it looks at copies."""
        running, waiting = list(self.running), list(self._waiting)
        own, others = {request.adapter for request in running}, {request.adapter for _, request in waiting if not request.finished}
        return sorted(own - {0}), sorted(others - {0})

    def first_waiting(self, count: int) -> list[Request]:
        """The first `count` of the waiting requests, in the order in which they will be admitted."""
        waiting = (entry for entry in self._waiting if not entry[1].finished)
        return [request for _, request in heapq.nsmallest(count, waiting, key=lambda entry: entry[0])]

    @property
    def has_requests(self) -> bool:
        return bool(self.running) or self._num_waiting > 0

    def add(self, request: Request) -> None:
        """Queues a request. It must be able to fit the pool on its own; the engine validates that before."""
        self.policy.arrived(request)
        self._enqueue(request)

    def schedule(self) -> SchedulerOutput:
        """Decides the next step, and moves its requests on as if it had run; `update` is to be told when it has."""
        output = SchedulerOutput()
        budget = self._continue_running(output)
        if not output.preempted:
            self._admit_waiting(output, budget)
        for item in output.scheduled:
            request = item.request
            request.num_computed_tokens += item.num_new_tokens - len(item.drafts)
            request.num_pending += item.samples
        self.stats.num_preemptions += len(output.preempted)
        self.stats.num_copied_blocks += len(output.copies)
        return output

    def update(self, output: SchedulerOutput) -> list[Request]:
        """The step has run: gives its requests what was `drawn` for them. Returns those that are now finished.

        A request gets one token, or with drafts those it accepted and one more; what follows a token that ends it is dropped.
        """
        self.stats.num_steps += 1
        finished = []
        computed = 0
        for item in output.scheduled:
            request = item.request
            request.num_pending -= item.samples
            if request.finish_reason is not None:  # aborted while the step ran, or by a token that came after the step was decided
                item.drawn = ()
                continue
            computed += item.num_new_tokens
            if request.adapter:
                self.stats.num_adapter_tokens += item.num_new_tokens
            reason = self._append(item)
            if request.num_computed_tokens >= (request.published_blocks + 1) * self.block_size:
                self._publish(request)
            if request.pooling is not None and not request.num_left:
                reason = "stop", None
            if reason is not None:
                self.finish(request, *reason)
                finished.append(request)
            elif item.drafts:
                self._give_back(request)
        self.stats.num_computed_tokens += computed
        return finished

    def reserve(self, request: Request, num_tokens: int) -> int:
        """Gives a running request blocks for its first `num_tokens` tokens, as far as nobody else may need them in the next step.

        Returns how many tokens its blocks now hold. For drafts that are computed before the step that verifies them.
        """
        spare = self.pool.num_free - len(self.running)
        missing = self._blocks_for(min(num_tokens, request.max_total_tokens)) - len(request.blocks)
        request.blocks.extend(self.pool.allocate() for _ in range(max(0, min(missing, spare))))
        return len(request.blocks) * self.block_size

    def finish(self, request: Request, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a request in any state (stop, length, abort, error); its blocks are free when this returns."""
        if request.finished:
            return
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release(request)
        else:
            self._num_waiting -= 1
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.fork_of = None
        self.policy.ended(request)

    def check_integrity(self) -> None:
        """Asserts every invariant of the block accounting. Cheap enough to run after each step of a test."""
        self.pool.check_integrity(request.blocks for request in self.running)
        for request in self.running:
            assert request.status is RequestStatus.RUNNING, f"{request.request_id} runs but is {request.status}"
            assert len(request.blocks) * self.block_size >= request.num_computed_tokens, "computed tokens without blocks"
        for node in self.prefix_cache.nodes() if self.prefix_cache is not None else ():
            parent = node.parent
            if parent is not None and parent.block >= 0 and self.pool.references(node.block):
                assert self.pool.references(parent.block), "a cached block is in use but the block before it is not"

    def _continue_running(self, output: SchedulerOutput) -> int:
        budget, size, scheduled = self.max_num_batched_tokens, self.block_size, output.scheduled
        for position, request in enumerate(self.running, 1):  # it may lose its last ones on the way
            left, start, count = request.num_left, request.num_computed_tokens, 1
            if left == 1 and not request.draft_token_ids and request.pooling is None:
                item = ScheduledRequest(request, start, 1, True)
            elif left:
                output.one_each = False
                item = self._share(request, left, budget, len(self.running) - position)
                count = item.num_new_tokens
            else:
                continue  # the token it waits for is its last
            if start + count > len(request.blocks) * size and not self._make_room(item, output):
                break  # it was last in order, and preempted itself
            scheduled.append(item)
            budget -= count
        return budget

    def _share(self, request: Request, left: int, budget: int, behind: int) -> ScheduledRequest:
        """What a request gets of the budget that has `behind` others after it, if it has several tokens left, or drafts."""
        count = min(left, self.max_prefill_chunk, budget - behind)
        samples = count == left and request.pooling is None
        drafts: Sequence[int] = ()
        if samples and request.draft_token_ids:
            drafts = self._take_drafts(request, budget - behind - count, behind)
        parents = request.draft_parents[: len(drafts)]
        return ScheduledRequest(request, request.num_computed_tokens, count + len(drafts), samples, drafts, parents)

    def _take_drafts(self, request: Request, budget: int, behind: int) -> list[int]:
        """The drafts that fit in what is over: of the budget, of the request's length, and of blocks nobody behind it may need."""
        drafts, request.draft_token_ids = request.draft_token_ids, []
        blocks = len(request.blocks) + max(0, self.pool.num_free - behind)
        room = min(budget, request.max_total_tokens - request.num_tokens - 1, blocks * self.block_size - request.num_tokens)
        return drafts[: max(0, room)]

    def _append(self, item: ScheduledRequest) -> tuple[FinishReason, int | None] | None:
        """Appends what was drawn, up to a token that ends the request; the KV of all but the newest is there already."""
        request = item.request
        for index, token in enumerate(item.drawn):
            request.append(token)
            if index:
                request.num_computed_tokens += 1
            if token in request.ending_ids or len(request.token_ids) >= request.max_total_tokens:
                reason = request.why_finished()
                if reason is not None:
                    item.drawn = item.drawn[: index + 1]
                    return reason
        return None

    def _give_back(self, request: Request) -> None:
        """Frees the blocks that only rejected drafts were in: taking a guess back is a length, and this."""
        keep = self._blocks_for(request.num_tokens)
        if keep < len(request.blocks):
            self.pool.release(request.blocks[keep:])
            request.blocks = request.blocks[:keep]

    def _make_room(self, item: ScheduledRequest, output: SchedulerOutput) -> bool:
        """Gives a running request the blocks for its share, preempting from the end of the order if it must."""
        request = item.request
        needed = self._blocks_for(item.start + item.num_new_tokens) - len(request.blocks)
        while self.pool.num_free < needed:
            victim = self.running[-1]
            self._preempt(victim, output)
            if victim is request:
                return False
        request.blocks.extend(self.pool.allocate() for _ in range(needed))
        return True

    def _admit_waiting(self, output: SchedulerOutput, budget: int) -> None:
        postponed = []  # those who wait for a step under way; they block nobody behind them
        while self._waiting and budget > 0:
            entry = heapq.heappop(self._waiting)
            request = entry[1]
            if request.finished:
                continue
            if request.num_pending or self._sibling_is_busy(request):
                postponed.append(entry)
                continue
            if not self._find_seat(request, output):
                postponed.append(entry)
                break
            self._count_admission(request)
            self.policy.admitted(request)
            self._num_waiting -= 1
            request.status = RequestStatus.RUNNING
            bisect.insort(self.running, request, key=self.policy.key)
            item = self._share(request, request.num_left, budget, 0)
            fits = self._make_room(item, output)
            assert fits, "admission has checked that the blocks are there"
            output.one_each = False
            output.scheduled.append(item)
            budget -= item.num_new_tokens
        for entry in postponed:
            heapq.heappush(self._waiting, entry)

    def _find_seat(self, request: Request, output: SchedulerOutput) -> bool:
        """Takes the request's known prefix and checks that the rest of it fits, displacing less urgent requests if allowed."""
        while True:
            if len(self.running) < self.max_num_seqs:
                self._take_prefix(request, output)
                missing = self._blocks_for(request.num_tokens) - len(request.blocks)
                # Each running request may need one more block before any is freed.
                spare = len(self.running)
                if self.pool.num_free >= missing + spare:
                    return True
                self._drop_prefix(request, output)
            victim = self.running[-1] if self.running else None
            if victim is None or not self.policy.displaces(request, victim):
                return False
            output.scheduled = [item for item in output.scheduled if item.request is not victim]
            self._preempt(victim, output)

    def _count_admission(self, request: Request) -> None:
        if request.num_preemptions:
            return  # a readmission says nothing about how much prompts have in common
        request.num_cached_tokens = request.num_computed_tokens
        if request.published_node is None and request.num_computed_tokens:
            self.stats.num_forked_tokens += request.num_computed_tokens
        elif self.prefix_cache is not None:
            self.stats.num_prefix_queries += request.num_prompt_tokens
            self.stats.num_prefix_hits += request.num_computed_tokens

    def _take_prefix(self, request: Request, output: SchedulerOutput) -> None:
        """References the blocks that hold the request's first tokens already: a sibling's, or cached ones.

        At least the last token is always left to compute, because its logits are wanted.
        """
        sibling = request.fork_of
        if sibling is not None and sibling.status is RequestStatus.RUNNING and request.num_tokens == request.num_prompt_tokens:
            self._fork(sibling, request, output)
        elif self.prefix_cache is not None and not request.needs_whole_prompt:
            blocks, node = self.prefix_cache.match(request.cache_key, request.token_ids[:-1])
            self.pool.share(blocks)
            request.blocks = blocks
            request.num_computed_tokens = len(blocks) * self.block_size
            request.published_blocks, request.published_node = len(blocks), node

    def _fork(self, sibling: Request, request: Request, output: SchedulerOutput) -> None:
        """Shares the full blocks of the sibling's prompt and copies the one the prompt ends in, if it ends inside one.

        sibling  [p p p p] [p p p p] [p p o o]      request shares the first two and gets a copy of the third,
        request     same      same   [p . . .]      of which it computes the prompt's last token itself
        """
        shared_tokens = request.num_prompt_tokens - 1
        full, rest = divmod(shared_tokens, self.block_size)
        if rest and not self.pool.num_free:
            return
        request.blocks = sibling.blocks[:full]
        self.pool.share(request.blocks)
        if rest:
            copy = self.pool.allocate()
            output.copies.append((sibling.blocks[full], copy))
            request.blocks.append(copy)
        request.num_computed_tokens = shared_tokens

    def _drop_prefix(self, request: Request, output: SchedulerOutput) -> None:
        own = set(request.blocks)
        output.copies = [(source, target) for source, target in output.copies if target not in own]
        self._release(request)

    def _sibling_is_busy(self, request: Request) -> bool:
        sibling = request.fork_of
        return sibling is not None and not sibling.finished and sibling.num_computed_tokens < request.num_prompt_tokens - 1

    def _publish(self, request: Request) -> None:
        """Offers the request's newly filled blocks to the prefix cache; where a twin stands there already, uses the twin."""
        cache = self.prefix_cache
        if cache is None:
            return
        size = self.block_size
        known = min(request.num_computed_tokens, request.num_tokens)  # a pending token may be computed before it is known
        for index in range(request.published_blocks, known // size):
            parent = request.published_node or cache.root(request.cache_key)
            block = request.blocks[index]
            node = cache.publish(parent, request.token_ids[index * size : (index + 1) * size], block)
            if node.block == block:
                self.pool.mark_cached(block)
            else:
                self.pool.share([node.block])
                self.pool.release([block])
                request.blocks = [*request.blocks[:index], node.block, *request.blocks[index + 1 :]]
            request.published_node = node
            request.published_blocks = index + 1

    def _preempt(self, victim: Request, output: SchedulerOutput) -> None:
        self.running.remove(victim)
        self._release(victim)
        victim.draft_token_ids, victim.draft_parents = [], []
        victim.num_preemptions += 1
        output.preempted.append(victim)
        self._enqueue(victim)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        request.num_computed_tokens = 0
        request.published_blocks, request.published_node = 0, None

    def _enqueue(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        heapq.heappush(self._waiting, (self.policy.key(request), request))
        self._num_waiting += 1

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
