"""How many drafts pay: what steps and drafts cost, measured as the engine runs, how often drafts are right, and an account of both.

A step of R sequences takes plain(R) without drafts. With n of them it takes e + b n longer (more rows of everything, and kernels that
are another way of computing once there are several), and making n drafts takes f + c n: nothing for prompt lookup, for a head a pass
over what the model has said meanwhile (f) and one for each further draft (c). Without drafts a token costs w = plain(R) / R, which is
what a right draft saves. So one at depth i, right with probability p^i, is worth making while

    p^i w > b + c        and all of a step's together while        their right ones' w  >  (b + c) n + e + f

On a device that waits for memory b is near 0 at batch 1, and w goes to b as the batch fills the arithmetic: the same rule makes
drafts long, short, or switches them off, per request and per step, with no threshold to set. A proposer that knows how likely each of its
drafts is goes by that instead of p^i (`Bar`): what it has made is paid for, and worth a check above b / w already, while another is
worth making where those it has are right with a chance above (b + c) / (p w).

Prices are kept by size of the batch, in powers of two: what is known of one sequence says little about thirty. Of a size that is new,
a draft is thought to cost what a token costs, and a step never has more than twice the drafts that were tried at its size before.

Estimates err, so there is an `Account` beside them: it pays what a step with drafts took longer than those without them take, and what
making them took, both as measured; right drafts pay into it, and each step adds a small share of its own time. What is drafted for
knowledge only where drafts don't seem to pay, is paid from that share too. So whatever the estimates say, speculation can't lose more
than the share and what the account held at first. Drafts that pay on average are wrong several times in a row now and then, so what they
have brought stays in the account, to be lost again, or bad luck would switch off for most of a text what pays (the test's simulated clock
shows it). Most of it is forgotten when another text begins.

Lines are drawn through what was seen, old observations forgotten. Prompt chunks are left out of them: their attention grows with
themselves. A step without drafts now and then keeps plain(R) true.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FORGET = 0.97  # weight of an observation after the next one
FORGET_PLAIN = 0.87  # the same of steps without drafts, which are few where drafts pay, and tell what they are held against
OUTLIER = 3.0  # times what was expected: more is the machine's doing, and counts as this much
DEAREST = 2.0  # tokens' worth that a draft's check may count for: one step that the machine held up mustn't end drafting for long
# What checks of a step are expected to take at least, in plain steps or tokens' worth for each: far more counts as the machine's doing.
CHEAPEST = 0.1
PRIOR, PRIOR_WEIGHT = 0.6, 2.0  # acceptance before anything is known, and how many drafts a new request's first guess is worth
REMEMBER, REMEMBER_ALL = 0.85, 0.98  # weight of a verified draft after the next one, of one request and of all
MARGIN = 1.15  # what a draft must promise over its cost: estimates err, and plain decoding doesn't
SHARE = 0.01  # of a step's time, spent on finding out whether drafts pay
HELD = 1.25  # plain steps' worth that the account holds at first, and saves up to
EARNED = 8.0  # and up to which right drafts fill it
KEPT = 2.0  # of that, what may be lost on the next text
PLAIN_EVERY = 32  # steps, of which one has no drafts, to compare with


class Line:
    """Least squares of seconds over a count. `forget`: the weight of an observation after the next one."""

    def __init__(self, forget: float = FORGET) -> None:
        self._forget = forget
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.slope: float | None = None  # unknown while one count only was seen; after that the last one known
        self.varied = False  # whether what is remembered has more than one count

    def __bool__(self) -> bool:
        """Whether anything was seen."""
        return self._weight > 0

    def observe(self, count: int, seconds: float) -> None:
        self._weight = self._weight * self._forget + 1
        self._x = self._x * self._forget + count
        self._y = self._y * self._forget + seconds
        self._xx = self._xx * self._forget + count**2
        self._xy = self._xy * self._forget + count * seconds
        mean = self._x / self._weight
        variance = self._xx / self._weight - mean**2
        self.varied = variance > 0.01
        if self.varied:
            self.slope = (self._xy / self._weight - mean * self._y / self._weight) / variance

    def at(self, count: float) -> float:
        """Seconds for so many; the mean of what was seen while the slope is unknown, and 0 before anything was."""
        if not self._weight:
            return 0.0
        return self._y / self._weight + (self.slope or 0.0) * (count - self._x / self._weight)

    @property
    def more(self) -> float:
        """Seconds for one more, never below 0. Where the count never varied, all of it is thought to be the counts' doing; and never is
        more than that: a line through noise that says so may be long out of date.
        """
        everything = max(0.0, self._y / self._x) if self._x else 0.0
        return everything if self.slope is None else min(everything, max(0.0, self.slope))

    @property
    def fixed(self) -> float:
        """Seconds for any at all, never below 0."""
        return max(0.0, self.at(0)) if self.slope is not None else 0.0


class StepCosts:
    """Of steps of about one size: seconds without drafts by number of sequences; how much longer drafts make them, by number of drafts."""

    def __init__(self) -> None:
        self.without, self.checking = Line(FORGET_PLAIN), Line()
        self.most = 0  # drafts that were checked in one step
        self._warm = False

    def ran(self, num_sequences: int, num_drafts: int, seconds: float) -> float:
        """A step of nothing but newest tokens and drafts took so long. Returns what its drafts cost, which noise may turn below nothing."""
        if not num_drafts:
            if self._warm:  # the first step of a size touches memory for the first time
                self.without.observe(num_sequences, _held_up(seconds, self.without.at(num_sequences)))
            self._warm = True
            return 0.0
        plain = self.plain(num_sequences)
        if not plain:  # a step of another size than it was drafted for: there is nothing to compare with
            return 0.0
        worth = num_drafts * plain / num_sequences
        longer = min(seconds - plain, DEAREST * worth)
        if self.checking:
            longer = min(longer, OUTLIER * max(self.checking.at(num_drafts), CHEAPEST * max(plain, worth)))
        self.checking.observe(num_drafts, longer)
        self.most = max(self.most, num_drafts)
        return longer

    def plain(self, num_sequences: int) -> float:
        """Seconds of a step without drafts; 0 before any was seen."""
        return max(0.0, self.without.at(num_sequences))

    def check(self, worth: float) -> float:
        """b: seconds to check one more draft; `worth`, what a token costs, before any was checked."""
        return self.checking.more if self.checking else worth


class CostModel:
    """What it costs one proposer to draft for steps of about one size: `steps`, what the drafts of all add to them, and making its own."""

    def __init__(self, steps: StepCosts) -> None:
        self.steps = steps
        self.making = Line()
        self._in_vain = 0.0

    def made(self, num_drafts: int, seconds: float) -> float:
        """Making so many drafts took so long; returns what of it counts. What led to none is part of the price of the next."""
        if not num_drafts:
            self._in_vain += seconds
            return seconds
        seconds = _held_up(seconds, self.making.at(num_drafts))
        self.making.observe(num_drafts, seconds + self._in_vain)
        self._in_vain = 0.0
        return seconds

    def plain(self, num_sequences: int) -> float:
        return self.steps.plain(num_sequences)

    def each(self, worth: float) -> float:
        """b + c: seconds to make one more draft and check it."""
        return self.steps.check(worth) + self.making.more

    @property
    def fixed(self) -> float:
        """e + f: seconds to draft at all."""
        return self.steps.checking.fixed + self.making.fixed


def _held_up(seconds: float, expected: float) -> float:
    """What counts of a duration."""
    return min(seconds, OUTLIER * expected) if expected > 0 else seconds


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
        self._plain = 0.0  # seconds of the last step that was reckoned

    def step(self, plain: float, count: int = 1) -> None:
        """So many steps went by, each of which takes `plain` seconds without drafts."""
        if plain > 0:
            self._plain, held = plain, HELD * plain
            if self.seconds is None:
                self.seconds = held
            elif self.seconds < held:
                self.seconds = min(held, self.seconds + SHARE * plain * count)
            self.seconds = min(self.seconds, EARNED * plain)

    def pay(self, seconds: float) -> None:
        if self.seconds is not None:
            self.seconds -= seconds

    def another_text(self) -> None:
        """Somebody came whose text may take to drafts otherwise."""
        if self.seconds is not None:
            self.seconds = min(self.seconds, KEPT * self._plain)


@dataclass(frozen=True, slots=True)
class Bar:
    """Chances of being right that drafts must have to pay, for who knows those of his own: a draft and all before it for its check
    (`check`), and all that there are so far for the making of another (`another`).
    """

    check: float = 0.0
    another: float = 0.0


NO_BAR = Bar()


def draft_length(rate: float, share: float, limit: int) -> int:
    """The largest i <= `limit` with rate^i > share, with the margin."""
    needed = share * MARGIN
    if needed <= 0:
        return limit
    if needed >= rate:
        return 0
    return min(limit, int(math.log(needed) / math.log(rate))) if rate < 1 else limit


def draft_lengths(
    rates: Sequence[float], costs: CostModel, limit: int, spare: float, batch: int | None = None, told: Sequence[bool] = ()
) -> tuple[list[int], Bar]:
    """How many drafts to make for each of some requests, which go through the model together, and with others where the `batch` is larger.
    Those whose drafts' chances will be `told` get as many as there may be, and the bar ends them.

    Where drafts don't pay, `spare` seconds may buy one each for those that are likeliest to be right, to learn whether they do now.
    """
    count = len(rates)
    batch = batch or count
    worth = costs.plain(batch) / batch if count else 0.0
    if worth <= 0 or spare < 0:
        return [0] * count, NO_BAR
    each, fixed = costs.each(worth), costs.fixed
    tried = 2 * costs.steps.most or limit * count
    lengths = _at_most(tried, [draft_length(rate, each / worth, limit) for rate in rates])
    saved = sum(worth * sum(rate**depth for depth in range(1, length + 1)) for rate, length in zip(rates, lengths, strict=True))
    if saved > MARGIN * (each * sum(lengths) + fixed):
        first = rates.index(max(rates))
        if not costs.steps.checking.varied and sum(lengths) < tried and lengths[first] < limit:
            # Of one count alone nobody learns what a further draft costs, nor that it costs less than it once seemed to.
            lengths[first] += 1
            return lengths, NO_BAR
        if any(told):
            lengths = _at_most(tried, [limit if length and known else length for length, known in zip(lengths, told, strict=True)])
        usual = sum(rates) / count
        return lengths, Bar(MARGIN * costs.steps.check(worth) / worth, MARGIN * each / (usual * worth))
    lengths = [0] * count
    left = spare - probe_price(costs, batch)
    for index in sorted(range(count), key=lambda index: -rates[index])[: 2 * costs.steps.most or count]:
        if left < 0:
            break
        lengths[index] = 1
        left -= each
    return lengths, NO_BAR


def probe_price(costs: CostModel, batch: int) -> float:
    """Seconds that one draft for a step of so many is thought to cost at most. What seems to cost more than the account ever saves up to
    is tried when it is full: the machine may have been held up when that was measured, and nobody would find out.
    """
    plain = costs.plain(batch)
    return min(costs.fixed + costs.each(plain / batch), HELD * plain)


def _at_most(most: int, lengths: list[int]) -> list[int]:
    """The longest cut until there are so many together; where one each is too much, the first get one."""
    longest = max(lengths, default=0)
    while longest > 1 and sum(lengths) > most:
        longest -= 1
        lengths = [min(length, longest) for length in lengths]
    if sum(lengths) > most:
        drafting = [index for index, length in enumerate(lengths) if length][:most]
        lengths = [int(index in drafting) for index in range(len(lengths))]
    return lengths
