"""`Speculation`: what the engine's loop asks. Before a step's end: which drafts go into the next one. After it: how right they were.

Who guesses is a `Proposer`; how many guesses pay is `policy.py`'s to say. There may be several: who the first has no idea for is asked of
the next. What is thought of a new request is what those before it were like.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from minfer.scheduler import Request, RequestStatus, ScheduledRequest, SchedulerOutput
from minfer.speculative.policy import PLAIN_EVERY, Account, StepCosts
from minfer.speculative.source import Proposer, Source
from minfer.speculative.verify import way


@dataclass(slots=True)
class SpeculationStats:
    """Counters since the start. `accepted_at[i]` counts how often the draft at depth i was kept.

    `seconds_gained` is what right drafts saved, less what all drafts cost, at the measured prices; 0 where drafts aren't adaptive, since
    nothing is known of steps without them then.
    """

    num_drafts: int = 0  # steps of a request that brought drafts
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)
    seconds_gained: float = 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per verified draft, the model's own one included."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    def since(self, earlier: SpeculationStats) -> SpeculationStats:
        """What has been counted after `earlier`, a copy of these counters."""
        return SpeculationStats(
            self.num_drafts - earlier.num_drafts,
            self.num_draft_tokens - earlier.num_draft_tokens,
            self.num_accepted_tokens - earlier.num_accepted_tokens,
            [now - then for now, then in zip(self.accepted_at, earlier.accepted_at, strict=True)],
            self.seconds_gained - earlier.seconds_gained,
        )

    def snapshot(self) -> dict[str, int]:
        """The counters as they are now, to subtract from later ones."""
        counts = {"drafts": self.num_drafts, "draft_tokens": self.num_draft_tokens, "accepted_tokens": self.num_accepted_tokens}
        return counts | {"drafts_gained_us": round(self.seconds_gained * 1e6)}


class Speculation:
    """`adaptive=False` always asks for `num_draft_tokens`, of the first proposer that has an idea."""

    def __init__(self, proposers: Sequence[Proposer], num_draft_tokens: int, adaptive: bool = True) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.adaptive = adaptive
        self.account = Account()
        self.stats = SpeculationStats(accepted_at=[0] * num_draft_tokens)
        self._steps: dict[int, StepCosts] = defaultdict(StepCosts)  # by the number of bits in a batch's size
        self.sources = [Source(proposer, self._steps) for proposer in proposers]
        self._drafted: dict[Request, Source] = {}  # whose drafts a request has
        self._worth = 0.0  # seconds that a right draft of the next step saves
        self._plain_steps, self._since_plain = 0, 0
        self._slept = 0  # steps that no account was given of

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """The step about to run copies these blocks, (from, to), of the KV cache."""
        for source in self.sources:
            source.proposer.copy_blocks(copies)

    def ran(self, plan: SchedulerOutput, seconds: float) -> None:
        """The step took so long, from its planning to its tokens; which of its drafts were right has been told (`verified`)."""
        if all(source.sleeps_through(plan) for source in self.sources):
            return
        size = len(plan.scheduled)
        costs = self._steps[size.bit_length()]
        if plan.one_each:
            costs.ran(size, 0, seconds)
            return
        drafts = sum(len(item.drafts) for item in plan.scheduled)
        own = sum(len(item.drafts) for item in plan.scheduled if item.request in self._drafted)
        if own == drafts and all(item.decodes for item in plan.scheduled):
            self._pay(costs.ran(size, drafts, seconds))
        else:  # prompts or somebody else's drafts took part of it
            self._pay(own * costs.check(costs.plain(size) / size))

    def draft(self, plan: SchedulerOutput, states: Sequence[torch.Tensor] = (), settled: Collection[Request] = ()) -> None:
        """Gives each request of the step that has one token left to compute its drafts for the next step.

        `states`: what a proposer asked to see of the step's tokens, [T, H] each. `settled` requests have their drafts already.
        """
        looking = [source for source in self.sources if not source.sleeps_through(plan)]
        awake = [source for source in looking if not source.asleep]
        if not awake:
            self._slept += 1
        going_on, rows = _moved_on(plan) if looking else ([], [])
        ready = [item.request for item in going_on if item.request.num_left == 1 and item.request not in settled]
        drafting = bool(awake and ready) and self._time_to_draft(len(ready))
        # A prompt's share of the proposers' work belongs to the prompt, and is no loss to decoding.
        decodes = plan.one_each or all(item.start >= item.request.num_prompt_tokens for item in plan.scheduled)
        if any(item.start < item.request.num_prompt_tokens for item in going_on):
            self.account.another_text()
        self._drafted = {}
        for source in self.sources:
            price = source.follow(going_on, states, rows, decodes) if source in looking else 0.0
            if source not in awake:  # only looking, if at all, so that what is guessed from is there
                source.asleep -= 1
            elif drafting:
                price += self._ask(source, ready)
            if decodes:
                self._pay(price)
        if looking:
            self._since_plain = self._since_plain + 1 if self._drafted else 0

    def _time_to_draft(self, size: int) -> bool:
        """Whether a step of so many may have drafts: one plain step at first, then one after a few with drafts, then fewer. What drafts
        cost shows beside them only.
        """
        if not self.adaptive:
            return True
        plain = self._steps[size.bit_length()].plain(size)
        self.account.step(plain, 1 + self._slept)
        self._slept = 0
        self._worth = plain / size
        if self._since_plain >= min(PLAIN_EVERY, 4 * self._plain_steps):
            self._plain_steps += 1
            return False
        return True

    def _ask(self, source: Source, ready: Sequence[Request]) -> float:
        """Has it draft for those of the next step who have no drafts yet. Returns what that cost."""
        left = [request for request in ready if request not in self._drafted]
        if not left:
            return 0.0
        counts = [self.num_draft_tokens] * len(left)
        if self.adaptive:
            counts = source.counts(left, len(ready), self.num_draft_tokens, self.account.seconds or 0.0)
        asked = [(request, count) for request, count in zip(left, counts, strict=True) if count]
        if not asked:
            return 0.0
        price = source.propose([request for request, _ in asked], [count for _, count in asked], len(ready))
        self._drafted.update((request, source) for request, _ in asked if request.draft_token_ids)
        return price

    def verified(self, item: ScheduledRequest) -> None:
        """The model has looked at the drafts of `item` and kept some."""
        drafted, accepted = len(item.drafts), len(item.kept)
        self.stats.num_drafts += 1
        self.stats.num_draft_tokens += drafted
        self.stats.num_accepted_tokens += accepted
        for index in range(accepted):
            self.stats.accepted_at[index] += 1
        depth = max(len(way(number, item.parents)) for number in range(1, drafted + 1)) if item.parents else drafted
        self._drafted.get(item.request, self.sources[0]).verified(item.request, depth, accepted)
        self._pay(-accepted * self._worth)

    def _pay(self, seconds: float) -> None:
        if self.adaptive:
            self.account.pay(seconds)
            self.stats.seconds_gained -= seconds


def _moved_on(plan: SchedulerOutput) -> tuple[list[ScheduledRequest], list[Sequence[int]]]:
    """Those of a step that go on, and the rows of what each has moved on by."""
    going_on: list[ScheduledRequest] = []
    rows: list[Sequence[int]] = []
    first = 0
    for item in plan.scheduled:
        if item.request.status is RequestStatus.RUNNING and item.request.pooling is None:
            going_on.append(item)
            rows.append(_standing(item, first))
        first += item.num_new_tokens
    return going_on, rows


def _standing(item: ScheduledRequest, first: int) -> Sequence[int]:
    """The rows of an item's tokens and of its right drafts, which may have branched off; its first token has the row `first`."""
    own = first + item.num_new_tokens - len(item.drafts)
    if not item.kept or item.kept[-1] == len(item.kept):
        return range(first, own + len(item.kept))
    return [*range(first, own), *(own - 1 + number for number in item.kept)]
