"""`Speculation`: what the engine's loop asks. Before a step's end: which drafts go into the next one. After it: how right they were.

Who guesses is a `Proposer`; how many guesses pay is `policy.py`'s to say. What is thought of a new request is what those before it were
like. To look at a step costs, too: a step takes milliseconds, and what Python does beside it a percent or two of that. So where drafts
don't pay and the account has no time for finding out whether they do by now, a proposer that guesses from the target's states doesn't see
steps of nothing but newest tokens until it has. Others look always: a text that begins to repeat itself is worth more than that.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from minfer.scheduler import Request, RequestStatus, ScheduledRequest, SchedulerOutput
from minfer.speculative.policy import PLAIN_EVERY, REMEMBER_ALL, SHARE, Acceptance, Account, CostModel, draft_lengths
from minfer.speculative.tree import DraftTree
from minfer.speculative.verify import way

LOOK_BACK = 16  # steps that a proposer sees before it guesses, where it guesses from the target's states
LONGEST_SLEEP = 512  # steps that nobody looks at, however much was lost
FORGET_REQUESTS = 64  # requests that are over, whose acceptance may still be held


class Proposer(Protocol):
    """Seam 4: guesses the next tokens of requests it follows from step to step.

    `after` names the target's inner states that it wants to see of every token (`Model.forward_states`); () for none.
    """

    after: Sequence[int]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """The step about to run copies these blocks, (from, to), of the KV cache."""
        ...

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> None:
        """A step over these has run, and they have moved on; requests that aren't among them are over or preempted. Not told are steps of
        one token for each of those that the step before was about, while nobody is asked for drafts.

        `states` holds, for each of `after`, a row for each token of the step, [T, H], which the next step overwrites; `rows[i]` are the
        rows of what `scheduled[i]` has moved on by, in order: its tokens and the drafts that stand.
        """
        ...

    def propose(self, requests: Sequence[Request], counts: Sequence[int], least: float) -> Sequence[list[int] | DraftTree]:
        """Up to `counts[i]` tokens expected next in `requests[i]`, each of which was followed; fewer, or none, without an idea.

        A draft whose chance is below `least` doesn't pay for its check; who can't tell chances need not care.
        """
        ...


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
    """`adaptive=False` always asks for `num_draft_tokens`."""

    def __init__(self, proposer: Proposer, num_draft_tokens: int, adaptive: bool = True) -> None:
        self.proposer = proposer
        self.num_draft_tokens = num_draft_tokens
        self.adaptive = adaptive
        self.account = Account()
        self.stats = SpeculationStats(accepted_at=[0] * num_draft_tokens)
        self._usual = Acceptance(remember=REMEMBER_ALL)  # of all requests
        self._acceptance: dict[Request, Acceptance] = {}
        self._costs: dict[int, CostModel] = defaultdict(CostModel)  # by the number of bits in a batch's size
        self._drafted: set[Request] = set()  # who has drafts of the proposer's
        self._least = 0.0  # chance of being right that a draft must have
        self._worth = 0.0  # seconds that a right draft of the last step saved
        self._plain_steps, self._since_plain = 0, 0
        self._warm = False
        self._asleep, self._slept = 0, 0  # steps without drafts to come, and so far
        self._look_back = LOOK_BACK if proposer.after else 0
        self._following = 0.0  # seconds that a step takes longer where it is looked at

    def costs(self, num_sequences: int) -> CostModel:
        """What is known of steps of about this size."""
        return self._costs[num_sequences.bit_length()]

    def ran(self, plan: SchedulerOutput, seconds: float) -> None:
        """The step took so long; whether its drafts were right is told afterwards."""
        if self._sleeps_through(plan):
            return
        size = len(plan.scheduled)
        costs = self.costs(size)
        self._worth = costs.plain(size) / size
        if plan.one_each:
            costs.ran(size, 0, seconds)
            return
        drafts = sum(len(item.drafts) for item in plan.scheduled)
        own = sum(len(item.drafts) for item in plan.scheduled if item.request in self._drafted)
        if own == drafts and all(item.decodes for item in plan.scheduled):
            self._pay(costs.ran(size, drafts, seconds))
        else:  # prompts or somebody else's drafts took part of it
            self._pay(own * costs.check(self._worth))

    def draft(self, plan: SchedulerOutput, states: Sequence[torch.Tensor] = (), settled: Collection[Request] = ()) -> None:
        """Gives each request of the step that has one token left to compute its drafts for the next step.

        `states`: what the proposer asked to see of the step's tokens, [T, H] each. `settled` requests have their drafts already.
        """
        if self._sleeps_through(plan):
            self._asleep -= 1
            self._slept += 1
            return
        started = time.perf_counter()
        going_on: list[ScheduledRequest] = []
        rows: list[Sequence[int]] = []
        first = 0
        for item in plan.scheduled:
            if item.request.status is RequestStatus.RUNNING and item.request.pooling is None:
                going_on.append(item)
                rows.append(_standing(item, first))
            first += item.num_new_tokens
        self.proposer.follow(going_on, states, rows)
        if len(self._acceptance) > FORGET_REQUESTS + 2 * len(going_on):
            self._acceptance = {item.request: self._known(item.request) for item in going_on}
        ready = [item.request for item in going_on if item.request.num_left == 1 and item.request not in settled]
        asked: list[tuple[Request, int]] = []
        if self._asleep:  # only looking, so that what is guessed from is there
            self._asleep -= 1
            self._slept += 1
        else:
            asked = [(request, count) for request, count in zip(ready, self._counts(ready), strict=True) if count]
        following = time.perf_counter() - started
        price = self._propose(asked, self.costs(len(ready))) if asked else 0.0
        self._drafted = {request for request, _ in asked if request.draft_token_ids}
        self._since_plain = self._since_plain + 1 if self._drafted else 0
        # A prompt's share of the proposer's work belongs to the prompt, and is no loss to decoding.
        if plan.one_each or all(item.start >= item.request.num_prompt_tokens for item in plan.scheduled):
            self._following += 0.1 * (following - self._following)
            self._pay(following + price if self._look_back else price if self._drafted else 0.0)

    def _sleeps_through(self, plan: SchedulerOutput) -> bool:
        """Whether nothing is looked at: until there is time again to find out whether drafts pay, and nobody came or went."""
        return self._asleep > self._look_back and plan.one_each and not plan.preempted

    def _known(self, request: Request) -> Acceptance:
        found = self._acceptance.get(request)
        if found is None:
            found = self._acceptance[request] = self._usual.heir()
        return found

    def _propose(self, asked: Sequence[tuple[Request, int]], costs: CostModel) -> float:
        """The requests' drafts; returns what they cost."""
        started = time.perf_counter()
        proposed = self.proposer.propose([request for request, _ in asked], [count for _, count in asked], self._least)
        for (request, _), drafts in zip(asked, proposed, strict=True):
            if isinstance(drafts, DraftTree):
                request.draft_token_ids, request.draft_parents = drafts.tokens, drafts.parents
            else:
                request.draft_token_ids, request.draft_parents = drafts, []
        made = sum(len(request.draft_token_ids) for request, _ in asked)
        if not self._warm:  # memory is touched for the first time, and libraries are loaded: it says nothing about the next
            self._warm = made > 0
            return 0.0
        return costs.made(made, time.perf_counter() - started)

    def verified(self, item: ScheduledRequest) -> None:
        """The model has looked at the drafts of `item` and kept some."""
        drafted, accepted = len(item.drafts), len(item.kept)
        self.stats.num_drafts += 1
        self.stats.num_draft_tokens += drafted
        self.stats.num_accepted_tokens += accepted
        for index in range(accepted):
            self.stats.accepted_at[index] += 1
        depth = max(len(way(number, item.parents)) for number in range(1, drafted + 1)) if item.parents else drafted
        self._known(item.request).verified(depth, accepted)
        self._usual.verified(depth, accepted)
        self._pay(-accepted * self._worth)

    def _pay(self, seconds: float) -> None:
        if self.adaptive:
            self.account.pay(seconds)
            self.stats.seconds_gained -= seconds

    def _counts(self, ready: Sequence[Request]) -> list[int]:
        if not self.adaptive:
            return [self.num_draft_tokens] * len(ready)
        if not ready:
            return []
        costs = self.costs(len(ready))
        plain = costs.plain(len(ready))
        self.account.step(plain, 1 + self._slept)
        self._slept = 0
        self._worth = plain / len(ready)
        # One plain step at first, then one after a few with drafts, then fewer: what drafts cost shows beside them only.
        if self._since_plain >= min(PLAIN_EVERY, 4 * self._plain_steps):
            self._plain_steps += 1
            return [0] * len(ready)
        held = self.account.seconds or 0.0
        lengths, self._least = draft_lengths([self._known(request).rate for request in ready], costs, self.num_draft_tokens, held)
        if self._look_back and plain > 0 and not any(lengths):
            missing = costs.fixed + costs.each(self._worth) + self._look_back * self._following - held
            self._asleep = self._look_back + min(LONGEST_SLEEP, int(missing / (SHARE * plain)) + 1) if missing > 0 else 0
        return lengths


def _standing(item: ScheduledRequest, first: int) -> Sequence[int]:
    """The rows of an item's tokens and of its right drafts, which may have branched off; its first token has the row `first`."""
    own = first + item.num_new_tokens - len(item.drafts)
    if not item.kept or item.kept[-1] == len(item.kept):
        return range(first, own + len(item.kept))
    return [*range(first, own), *(own - 1 + number for number in item.kept)]
