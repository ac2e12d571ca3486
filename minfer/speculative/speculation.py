"""`Speculation`: what the engine's loop asks, once before a step's end and once after it has been verified.

It holds each running request's index and acceptance, and forgets a request when it stops running: a preempted one is
indexed again when it comes back. Left out here: proposers with weights of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from minfer.config import EngineConfig
from minfer.scheduler import Request
from minfer.speculative.ngram import NgramIndex
from minfer.speculative.policy import Acceptance, CostModel, draft_length


class Drafter(Protocol):
    """Guesses for one sequence, which it follows from when it is made."""

    def continuation(self, count: int) -> list[int]:
        """Up to `count` tokens expected next; fewer, or none, where it has no idea."""
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

    def snapshot(self) -> dict[str, int]:
        """The counters as they are now, to subtract from later ones."""
        return {"drafts": self.num_drafts, "draft_tokens": self.num_draft_tokens, "accepted_tokens": self.num_accepted_tokens}


@dataclass(slots=True)
class _State:
    drafter: Drafter
    acceptance: Acceptance


class Speculation:
    """`min_match`: tokens that must agree before a continuation is copied. `adaptive=False` always drafts `num_draft_tokens`."""

    def __init__(self, num_draft_tokens: int, min_match: int, adaptive: bool = True) -> None:
        self.num_draft_tokens = num_draft_tokens
        self.min_match = min_match
        self.adaptive = adaptive
        self.costs = CostModel()
        self.stats = SpeculationStats(accepted_at=[0] * num_draft_tokens)
        self._states: dict[Request, _State] = {}

    def draft(self, running: Sequence[Request]) -> None:
        """Gives each running request that has one token left to compute its drafts for the next step."""
        states = self._states
        self._states = {request: states.get(request) or self._follow(request) for request in running if request.num_left == 1}
        share = self.costs.share(len(self._states)) if self.adaptive else 0.0
        for request, state in self._states.items():
            count = draft_length(state.acceptance.rate, share, self.num_draft_tokens) if self.adaptive else self.num_draft_tokens
            request.draft_token_ids = state.drafter.continuation(count) if count else []
            if not count:
                state.acceptance.idle()

    def verified(self, request: Request, drafted: int, accepted: int) -> None:
        """The model has looked at `drafted` tokens and kept the first `accepted`."""
        self.stats.num_drafts += 1
        self.stats.num_draft_tokens += drafted
        self.stats.num_accepted_tokens += accepted
        for index in range(accepted):
            self.stats.accepted_at[index] += 1
        state = self._states.get(request)
        if state is not None:
            state.acceptance.verified(drafted, accepted)

    def _follow(self, request: Request) -> _State:
        return _State(self._drafter(request), Acceptance())

    def _drafter(self, request: Request) -> Drafter:
        return NgramIndex(request.token_ids, self.min_match)


def create_speculation(config: EngineConfig) -> Speculation | None:
    """What the configuration asks for; None when it is to decode one token at a time."""
    if config.speculative == "none":
        return None
    return Speculation(config.num_draft_tokens, config.ngram_min_match, config.adaptive_drafts)
