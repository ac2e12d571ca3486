"""How many drafts pay: what steps and drafts cost, measured as the engine runs, how often drafts are right, and an account of both.

A step over T tokens takes about a + b T seconds: `a` reads the weights, `b` is one token's arithmetic and KV. Making n drafts takes
f + c n: nothing for prompt lookup, for a head a pass over what the model has said meanwhile (f) and one for each further draft (c).
With R sequences a token costs w = (a + b R) / R without drafts, which is what a right draft saves. So one at depth i, right with
probability p^i, is worth making while

    p^i w > b + c        and all of a step's together while        their right ones' w  >  (b + c) n + f

On a device that waits for memory b is near 0 at batch 1, and w goes to b as the batch fills the arithmetic: the same rule makes
drafts long, short, or switches them off, per request and per step, with no threshold to set.

Estimates err, so there is an `Account` beside them: drafts are paid from it at the measured prices, right ones pay into it, and each step
adds a small share of its own time. What is drafted for knowledge only, where drafts don't seem to pay, is paid from that share too. So
whatever the estimates say, speculation can't lose more than the share and what the account held at first.

`a`, `b`, `f` and `c` are lines through what was seen, old observations forgotten. Prompt chunks are left out of them: their attention
grows with themselves. A step without drafts now and then keeps the lines from being drawn through one point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FORGET = 0.97  # weight of an observation after the next one
OUTLIER = 3.0  # times what was expected: more is the machine's doing, and counts as this much
PRIOR, PRIOR_WEIGHT = 0.6, 2.0  # acceptance before anything is known, and how many drafts a new request's first guess is worth
REMEMBER, REMEMBER_ALL = 0.85, 0.98  # weight of a verified draft after the next one, of one request and of all
MARGIN = 1.15  # what a draft must promise over its cost: estimates err, and plain decoding doesn't
SHARE = 0.02  # of a step's time, spent on finding out whether drafts pay
HELD = 2.0  # plain steps' worth that the account holds at first, and at most
PLAIN_EVERY = 32  # steps, of which one has no drafts, to compare with


class Line:
    """Least squares of seconds over a count, with exponential forgetting."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.slope: float | None = None  # unknown while one count only was seen; after that the last one known

    def observe(self, count: int, seconds: float) -> float:
        """Returns the seconds that count."""
        if self.slope is not None and self.at(count) > 0:
            seconds = min(seconds, OUTLIER * self.at(count))
        self._weight = self._weight * FORGET + 1
        self._x = self._x * FORGET + count
        self._y = self._y * FORGET + seconds
        self._xx = self._xx * FORGET + count**2
        self._xy = self._xy * FORGET + count * seconds
        mean = self._x / self._weight
        variance = self._xx / self._weight - mean**2
        if variance > 0.01:
            self.slope = (self._xy / self._weight - mean * self._y / self._weight) / variance
        return seconds

    def at(self, count: float) -> float:
        """Seconds for so many; the mean of what was seen while the slope is unknown, and 0 before anything was."""
        if not self._weight:
            return 0.0
        return self._y / self._weight + (self.slope or 0.0) * (count - self._x / self._weight)


class CostModel:
    """The lines of steps over tokens, and of making drafts over their number."""

    def __init__(self) -> None:
        self.steps, self.making = Line(), Line()
        self._in_vain = 0.0
        self._warm = False

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of nothing but newest tokens and drafts took so long."""
        self.steps.observe(num_tokens, seconds)

    def made(self, num_drafts: int, seconds: float) -> float:
        """Making so many drafts took so long; returns what they cost. What led to none is part of the price of the next.

        The first drafts of an engine say nothing: memory is touched for the first time, and libraries are loaded.
        """
        if not self._warm:
            self._warm = num_drafts > 0
            return 0.0
        if not num_drafts:
            self._in_vain += seconds
            return 0.0
        seconds = self.making.observe(num_drafts, seconds + self._in_vain)
        self._in_vain = 0.0
        return seconds

    @property
    def check(self) -> float:
        """b: seconds to check a draft."""
        return max(0.0, self.steps.slope or 0.0)

    @property
    def each(self) -> float:
        """b + c: seconds to make one more draft and check it. Where the drafts' number never varied, f counts as part of it."""
        making = self.making
        return self.check + max(0.0, making.slope if making.slope is not None else making.at(1))

    @property
    def fixed(self) -> float:
        """f: seconds to draft at all."""
        return max(0.0, self.making.at(0)) if self.making.slope is not None else 0.0

    def plain(self, num_sequences: int) -> float:
        """a + b R: seconds of a step without drafts; 0 before any was seen."""
        return max(0.0, self.steps.at(num_sequences))


@dataclass(slots=True)
class Acceptance:
    """How often drafts have been right, newer ones counting more."""

    right: float = PRIOR * PRIOR_WEIGHT
    tried: float = PRIOR_WEIGHT
    remember: float = REMEMBER

    @property
    def rate(self) -> float:
        return self.right / self.tried

    def verified(self, drafted: int, accepted: int) -> None:
        """Drafts after the first wrong one say nothing: they were guesses about another text."""
        for index in range(min(drafted, accepted + 1)):
            self.right = self.right * self.remember + (index < accepted)
            self.tried = self.tried * self.remember + 1

    def heir(self) -> Acceptance:
        """What to think of a request of which nothing is known yet."""
        return Acceptance(self.rate * PRIOR_WEIGHT, PRIOR_WEIGHT)


class Account:
    """Seconds that drafting may still lose."""

    def __init__(self) -> None:
        self.seconds: float | None = None  # nothing to reckon with before a step was seen

    def step(self, plain: float) -> None:
        """A step went by that takes `plain` seconds without drafts."""
        if plain > 0:
            held = HELD * plain
            self.seconds = held if self.seconds is None else min(held, self.seconds + SHARE * plain)

    def pay(self, seconds: float) -> None:
        if self.seconds is not None:
            self.seconds -= seconds


def draft_length(rate: float, share: float, limit: int) -> int:
    """The largest i <= `limit` with rate^i > share, with the margin."""
    needed = share * MARGIN
    if needed <= 0:
        return limit
    if needed >= rate:
        return 0
    return min(limit, int(math.log(needed) / math.log(rate))) if rate < 1 else limit


def draft_lengths(rates: Sequence[float], costs: CostModel, limit: int, spare: float) -> list[int]:
    """How many drafts to make for each of some requests, which go through the model together.

    Where drafts don't pay, `spare` seconds may buy one each for those that are likeliest to be right, to learn whether they do now.
    """
    count = len(rates)
    worth = costs.plain(count) / count if count else 0.0
    if worth <= 0 or spare < 0:
        return [0] * count
    lengths = [draft_length(rate, costs.each / worth, limit) for rate in rates]
    saved = sum(worth * sum(rate**depth for depth in range(1, length + 1)) for rate, length in zip(rates, lengths, strict=True))
    if saved > MARGIN * (costs.each * sum(lengths) + costs.fixed) or costs.each == 0:
        return lengths
    left = spare - costs.fixed
    lengths = [0] * count
    for index in sorted(range(count), key=lambda index: -rates[index]):
        left -= costs.each
        lengths[index] = int(left >= 0)
    return lengths
