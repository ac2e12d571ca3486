"""`Speculation`: what the engine's loop asks. Before a step's end: which drafts go into the next one. After it: how right they were.

Who guesses is a `Proposer`; how many guesses pay is `policy.py`'s to say. A request is forgotten when it stops running: a
preempted one is met as new when it comes back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from minfer.scheduler import Request, RequestStatus, ScheduledRequest
from minfer.speculative.policy import Acceptance, CostModel, draft_length


class Proposer(Protocol):
    """Seam 4: guesses the next tokens of requests it follows from step to step.

    `after` names the target's inner states that it wants to see of every token (`Model.forward_states`); () for none.
    """

    after: Sequence[int]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """The step about to run copies these blocks, (from, to), of the KV cache."""
        ...

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[Sequence[torch.Tensor]]) -> None:
        """A step over these has run, and they have moved on; requests that aren't among them are over or preempted.

        `states[i]` holds, for each of `after`, a row for each of the tokens that `scheduled[i]` computed, drafts included:
        [num_new_tokens, H]. They are views that the next step overwrites.
        """
        ...

    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        """Up to `counts[i]` tokens expected next in `requests[i]`, each of which was followed; fewer, or none, without an idea."""
        ...


@dataclass(slots=True)
class SpeculationStats:
    """Counters since the start. `accepted_at[i]` counts how often the draft at depth i was kept."""

    num_drafts: int = 0  # steps of a request that brought drafts
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)

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
        )

    def snapshot(self) -> dict[str, int]:
        """The counters as they are now, to subtract from later ones."""
        return {"drafts": self.num_drafts, "draft_tokens": self.num_draft_tokens, "accepted_tokens": self.num_accepted_tokens}


class Speculation:
    """`adaptive=False` always asks for `num_draft_tokens`."""

    def __init__(self, proposer: Proposer, num_draft_tokens: int, adaptive: bool = True) -> None:
        self.proposer = proposer
        self.num_draft_tokens = num_draft_tokens
        self.adaptive = adaptive
        self.costs = CostModel()
        self.stats = SpeculationStats(accepted_at=[0] * num_draft_tokens)
        self._acceptance: dict[Request, Acceptance] = {}

    def draft(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor] = ()) -> None:
        """Gives each request of the step that has one token left to compute its drafts for the next step.

        `states`: what the proposer asked to see of the step's tokens, [T, H] each.
        """
        rows = [state.split([item.num_new_tokens for item in scheduled]) for state in states]
        generating = (item.request.status is RequestStatus.RUNNING and item.request.pooling is None for item in scheduled)
        running = [index for index, going_on in enumerate(generating) if going_on]
        going_on = [scheduled[index] for index in running]
        self.proposer.follow(going_on, [[state[index] for state in rows] for index in running])
        known = self._acceptance
        self._acceptance = {item.request: known.get(item.request) or Acceptance() for item in going_on}
        ready = [item.request for item in going_on if item.request.num_left == 1]
        counts = self._counts(ready)
        asked = [(request, count) for request, count in zip(ready, counts, strict=True) if count]
        started = time.perf_counter()
        for (request, _), drafts in zip(asked, self.proposer.propose([r for r, _ in asked], [c for _, c in asked]), strict=True):
            request.draft_token_ids = drafts
        drafted = sum(len(request.draft_token_ids) for request in ready)
        if drafted:
            self.costs.drafted(drafted, time.perf_counter() - started)

    def verified(self, request: Request, drafted: int, accepted: int) -> None:
        """The model has looked at `drafted` tokens and kept the first `accepted`."""
        self.stats.num_drafts += 1
        self.stats.num_draft_tokens += drafted
        self.stats.num_accepted_tokens += accepted
        for index in range(accepted):
            self.stats.accepted_at[index] += 1
        if request in self._acceptance:
            self._acceptance[request].verified(drafted, accepted)

    def _counts(self, ready: Sequence[Request]) -> list[int]:
        if not self.adaptive:
            return [self.num_draft_tokens] * len(ready)
        share = self.costs.share(len(ready))
        counts = [draft_length(self._acceptance[request].rate, share, self.num_draft_tokens) for request in ready]
        for request, count in zip(ready, counts, strict=True):
            if not count:
                self._acceptance[request].idle()
        return counts
