"""How many drafts pay: a small cost model of the step, measured as the engine runs, and each request's own acceptance.

A step over T tokens takes about a + b T seconds: `a` reads the weights, `b` is one token's arithmetic and KV. With R sequences
and no drafts, a token costs (a + b R) / R. A draft at depth i costs b to check and c to make (nothing for prompt lookup, a pass
for a draft model), and saves a token's worth with probability p^i, p being how often this request's drafts have been right. So
it pays while

    p^i > (b + c) R / (a + b R)

On a device that waits for memory the right side is near 0 at batch 1 and goes to 1 as the batch fills the arithmetic: the same
rule makes drafts long, short, or switches them off, per request and per step, with no threshold to set.

`a` and `b` are a line through the steps seen, `c` is a mean, old ones forgotten. `p` starts at an optimistic guess and returns to it
slowly while nothing is drafted, so that a request whose text has changed is tried again. Prompt chunks are left out of the
line: their attention grows with themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FORGET = 0.97  # weight of a step in the line after the next one
PRIOR, PRIOR_WEIGHT = 0.6, 1.0  # acceptance of a request of which nothing is known, and how many drafts that is worth
REMEMBER = 0.85  # weight of a verified draft after the next one
RECOVER = 0.98  # the same after a step that drafted nothing
MARGIN = 1.15  # what a draft must promise over its cost: estimates err, and plain decoding doesn't


class CostModel:
    """Least squares of seconds over tokens with exponential forgetting."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._slope: float | None = None
        self._making = 0.0
        self._made = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        self._weight = self._weight * FORGET + 1
        for name, value in (("_x", num_tokens), ("_y", seconds), ("_xx", num_tokens**2), ("_xy", num_tokens * seconds)):
            setattr(self, name, getattr(self, name) * FORGET + value)
        mean = self._x / self._weight
        variance = self._xx / self._weight - mean**2
        # With steps of one size only, there is no new line; the last slope is kept.
        if variance > 0.01:
            self._slope = (self._xy / self._weight - mean * self._y / self._weight) / variance

    def drafted(self, num_tokens: int, seconds: float) -> None:
        """Making so many drafts took so long."""
        self._making = self._making * FORGET + seconds
        self._made = self._made * FORGET + num_tokens

    def share(self, num_sequences: int) -> float:
        """(b + c) R / (a + b R): what a draft costs, as a share of what a token costs without drafts. 0 while unknown."""
        if self._slope is None:
            return 0.0
        plain = self._y / self._weight + self._slope * (num_sequences - self._x / self._weight)
        if plain <= 0:
            return 1.0
        making = self._making / self._made if self._made else 0.0
        return min(1.0, max(0.0, (self._slope + making) * num_sequences / plain))


@dataclass(slots=True)
class Acceptance:
    """How often one request's drafts have been right, newer ones counting more."""

    right: float = PRIOR * PRIOR_WEIGHT
    tried: float = PRIOR_WEIGHT

    @property
    def rate(self) -> float:
        return self.right / self.tried

    def verified(self, drafted: int, accepted: int) -> None:
        """Drafts after the first wrong one say nothing: they were guesses about another text."""
        for index in range(min(drafted, accepted + 1)):
            self.right = self.right * REMEMBER + (index < accepted)
            self.tried = self.tried * REMEMBER + 1

    def idle(self) -> None:
        """A step went by without a draft."""
        self.right = self.right * RECOVER + PRIOR * PRIOR_WEIGHT * (1 - RECOVER)
        self.tried = self.tried * RECOVER + PRIOR_WEIGHT * (1 - RECOVER)


def draft_length(rate: float, share: float, limit: int) -> int:
    """The largest i <= `limit` with rate^i > share, with the margin."""
    needed = share * MARGIN
    if needed <= 0:
        return limit
    if needed >= rate:
        return 0
    return min(limit, int(math.log(needed) / math.log(rate))) if rate < 1 else limit
