"""`Source`: one proposer, with what is known of it: how often its drafts are right, what they cost to make, and whether it sleeps.

To look at a step costs, too: a step takes milliseconds, and what Python does beside it several percent of that. So where drafts don't pay
and the account has no time for finding out whether they do by now, a proposer isn't asked until it has, nor does it see steps of nothing
but newest tokens until then, or until `LOOK_BACK` steps before where it guesses from the target's states.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

from minfer.scheduler import Request, ScheduledRequest, SchedulerOutput
from minfer.speculative.policy import NO_BAR, REMEMBER_ALL, SHARE, Acceptance, Bar, CostModel, StepCosts, draft_lengths, probe_price
from minfer.speculative.tree import DraftTree

LOOK_BACK = 16  # steps that a proposer sees before it guesses, where it guesses from the target's states
LONGEST_SLEEP = 512  # steps that nobody looks at, however much was lost
FORGET_REQUESTS = 64  # requests that are over, whose acceptance may still be held


class Proposer(Protocol):
    """Seam 4: guesses the next tokens of requests it follows from step to step.

    `after` names the target's inner states that it wants to see of every token (`Model.forward_states`); () for none. `tells_chances`: it
    knows how likely each draft of a greedy request is, and ends where the `bar` says.
    """

    after: Sequence[int]
    tells_chances: bool

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

    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> Sequence[list[int] | DraftTree]:
        """Up to `counts[i]` tokens expected next in `requests[i]`, each of which was followed; fewer, or none, without an idea."""
        ...


class Source:
    """`steps`: what steps cost, by the number of bits in a batch's size, which all sources of an engine share."""

    def __init__(self, proposer: Proposer, steps: dict[int, StepCosts]) -> None:
        self.proposer = proposer
        self.asleep = 0  # steps without drafts of it to come
        self._following = 0.0  # seconds that a step takes longer where this looks at it
        self._look_back = LOOK_BACK if proposer.after else 0
        self._steps = steps
        self._costs: dict[int, CostModel] = {}
        self._usual = Acceptance(remember=REMEMBER_ALL)  # of all requests
        self._acceptance: dict[Request, Acceptance] = {}
        self._bar = NO_BAR
        self._warm = False

    def sleeps_through(self, plan: SchedulerOutput) -> bool:
        """Whether it doesn't look at this step: until there is time again to find out whether drafts pay, and nobody came or went."""
        return self.asleep > self._look_back and plan.one_each and not plan.preempted

    def follow(
        self, going_on: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]], decodes: bool
    ) -> float:
        """Shows it a step, which `decodes` if no prompt is in it. Returns the seconds that count of this."""
        started = time.perf_counter()
        self.proposer.follow(going_on, states if self.proposer.after else (), rows)
        if len(self._acceptance) > FORGET_REQUESTS + 2 * len(going_on):
            self._acceptance = {item.request: self._known(item.request) for item in going_on}
        seconds = time.perf_counter() - started
        if decodes:
            self._following += 0.1 * (seconds - self._following)
        return seconds if self._look_back else 0.0

    def counts(self, requests: Sequence[Request], batch: int, limit: int, held: float) -> list[int]:
        """How many drafts to make for each of these, who are among the `batch` of the next step, where drafting may lose `held` seconds."""
        costs = self._costs_of(batch)
        rates = [self._known(request).rate for request in requests]
        told = [self.proposer.tells_chances and request.params.greedy for request in requests]
        counts, self._bar = draft_lengths(rates, costs, limit, held, batch, told)
        plain = costs.plain(batch)
        if plain > 0 and not any(counts):
            missing = probe_price(costs, batch) + self._look_back * self._following - held
            self.asleep = self._look_back + min(LONGEST_SLEEP, int(missing / (SHARE * plain)) + 1) if missing > 0 else 0
        return counts

    def propose(self, requests: Sequence[Request], counts: Sequence[int], batch: int) -> float:
        """Gives these their drafts. Returns the seconds that count of making them."""
        started = time.perf_counter()
        made = 0
        for request, drafts in zip(requests, self.proposer.propose(requests, counts, self._bar), strict=True):
            tokens, parents = (drafts.tokens, drafts.parents) if isinstance(drafts, DraftTree) else (drafts, [])
            request.draft_token_ids, request.draft_parents = tokens, parents
            made += len(tokens)
        if not self._warm:  # memory is touched for the first time, and libraries are loaded: it says nothing about the next
            self._warm = made > 0
            return 0.0
        seconds = self._costs_of(batch).made(made, time.perf_counter() - started)
        return seconds if made or self._look_back else 0.0  # what a search found nothing in is part of the next find's price

    def verified(self, request: Request, depth: int, accepted: int) -> None:
        """Of drafts that went so far ahead, so many were right."""
        self._known(request).verified(depth, accepted)
        self._usual.verified(depth, accepted)

    def _costs_of(self, batch: int) -> CostModel:
        """What is known of steps of about this size."""
        bits = batch.bit_length()
        found = self._costs.get(bits)
        if found is None:
            found = self._costs[bits] = CostModel(self._steps[bits])
        return found

    def _known(self, request: Request) -> Acceptance:
        found = self._acceptance.get(request)
        if found is None:
            found = self._acceptance[request] = self._usual.heir()
        return found
