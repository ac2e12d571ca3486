"""Tokens that a grammar leaves no choice about: they enter the next step together, and cost no forward pass of their own.

After `{"` a schema may allow one name only, and after `"name` nothing but `":`. Such a run goes into the next step as drafts, beside the
token that led to it: one pass computes their keys and values, as it would for a prompt, and gives the token that follows them. They are
verified like all drafts, because the grammar decides the text but not always its tokens (`na` + `me` spells `name` too): so the output is
that of one token a step, whatever the sampling.

Unlike guesses they are almost always right, so no request's estimate of acceptance learns from them, and no limit but their number holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minfer.scheduler import Request, RequestStatus, ScheduledRequest

MOST_FORCED = 32  # tokens of one run that enter a step; the rest of a longer one is found again after it

Forced = Callable[[Request], Sequence[int]]


@dataclass(slots=True)
class ForcedStats:
    """Counters since the start: runs that entered a step, their tokens, and those of them that stood."""

    num_runs: int = 0
    num_tokens: int = 0
    num_accepted_tokens: int = 0


class ForcedDrafts:
    """`forced` names the tokens that must come next in a request whose output has a form."""

    def __init__(self, forced: Forced) -> None:
        self.stats = ForcedStats()
        self._forced = forced
        self._given: set[Request] = set()

    def draft(self, scheduled: Sequence[ScheduledRequest]) -> set[Request]:
        """Gives their forced tokens to the requests of a step that is over; returns those that got some."""
        self._given = set()
        for request in (item.request for item in scheduled):
            if request.params.grammar is None or request.status is not RequestStatus.RUNNING or request.num_left != 1:
                continue
            tokens = self._forced(request)
            if tokens:
                request.draft_token_ids, request.draft_parents = list(tokens[:MOST_FORCED]), []
                self._given.add(request)
        return self._given

    def verified(self, item: ScheduledRequest) -> bool:
        """The model has looked at the drafts of `item` and kept some; False if they were somebody else's."""
        if item.request not in self._given:
            return False
        self.stats.num_runs += 1
        self.stats.num_tokens += len(item.drafts)
        self.stats.num_accepted_tokens += len(item.kept)
        return True
