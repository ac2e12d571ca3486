"""Drafts as heads make them: guesses place by place, each with its chance, of which the likeliest become a chain or a tree.

A head gives a distribution for each place ahead. One guess a place makes a chain; several make a tree, whose best nodes are the
ones worth checking (EAGLE-2: Li et al., arXiv 2406.16858; Medusa: Cai et al., arXiv 2401.10774):

    place 1    the 0.6      a 0.3           a node's chance is the product along its way: the 0.6, the cat 0.36, a 0.3,
    place 2    cat 0.6     dog 0.2          a cat 0.18, the dog 0.12; a budget of four takes the first four

A guess that is drawn at a temperature is drawn with the very number that the target will use. Its probability then says little about
whether the target draws it too, so it counts as sure, and the measured acceptance decides how far to go.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from minfer.sampling import SamplingRow
from minfer.speculative.policy import Bar

Guess = tuple[int, float]  # a token, and the chance that it is the next one if those before it are


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Drafts that branch. `parents[i]`: the draft, from 1, that draft i + 1 follows, before which it never stands; 0: the newest token."""

    tokens: list[int]
    parents: list[int]


class Opinion:
    """What a head thinks of one place of some requests. logits[R, Vd] over `token_ids` (None: all ids); they are not kept."""

    def __init__(self, logits: torch.Tensor, token_ids: torch.Tensor | None, top_k: int) -> None:
        best = logits.topk(top_k)
        self._chances = (best.values - logits.logsumexp(-1, keepdim=True)).exp().tolist()
        self._tokens = (best.indices if token_ids is None else token_ids[best.indices]).tolist()

    def guesses(self, row: int, drawn: int, asked: SamplingRow) -> list[Guess]:
        """The drawn token and those that may come in its place."""
        found = dict(zip(self._tokens[row], self._chances[row], strict=True))
        own = found.pop(drawn, self._chances[row][-1]) if asked.params.greedy else 1.0
        return [(drawn, own), *list(found.items())[: len(self._tokens[row]) - 1]]


@dataclass(slots=True)
class Sketch:
    """What has been guessed for one request: at most `limit` drafts are wanted of it, none with a chance below the `bar`.

    `chance` is that of all drawn guesses being right, `chances` that of each guess behind the drawn ones.
    """

    limit: int
    bar: Bar
    places: list[list[Guess]] = field(default_factory=list)  # at each the drawn token first
    chance: float = 1.0
    chances: list[float] = field(default_factory=list)

    @property
    def drawn(self) -> list[int]:
        return [guesses[0][0] for guesses in self.places]

    @property
    def wants_more(self) -> bool:
        if len(self.places) >= self.limit or (self.places and self.chance < self.bar.another):
            return False
        return sum(other > self.chance for other in self.chances) < self.limit  # else a further place has no part in the best tree

    def add(self, guesses: Sequence[Guess]) -> None:
        self.places.append(list(guesses))
        self.chances += (self.chance * own for _, own in guesses)
        self.chance *= guesses[0][1]

    def close(self) -> None:
        """The head has no more to say here."""
        self.limit = len(self.places)

    def chain(self) -> list[int]:
        tokens, chance = [], 1.0
        for (token, own), *_ in self.places:
            chance *= own
            if chance < self.bar.check:
                break
            tokens.append(token)
        return tokens

    def tree(self, budget: int, everywhere: bool) -> DraftTree:
        """The `budget` likeliest. `everywhere`: a place's guesses may follow any of the place before, not the drawn one alone."""
        chosen: list[tuple[int, int, bool]] = []  # (parent, token, drawn so far), in order of falling chance
        waiting: list[tuple[float, int, int, int, int, bool]] = []  # (-chance, order, place, parent, token, drawn so far)

        def reach(place: int, parent: int, chance: float, drawn: bool) -> None:
            if place < len(self.places) and (drawn or everywhere):
                for number, (token, own) in enumerate(self.places[place]):
                    if chance * own >= self.bar.check:
                        heapq.heappush(waiting, (-chance * own, len(waiting), place, parent, token, drawn and number == 0))

        reach(0, 0, 1.0, True)
        while waiting and len(chosen) < budget:
            minus, _, place, parent, token, drawn = heapq.heappop(waiting)
            chosen.append((parent, token, drawn))
            reach(place + 1, len(chosen), -minus, drawn)
        return _trunk_first(chosen)


def _trunk_first(chosen: Sequence[tuple[int, int, bool]]) -> DraftTree:
    """Renumbers so that the way through each likeliest follower comes first: it is computed as a chain, and needs no tails."""
    trunk, at = [], 0
    for number, (parent, *_) in enumerate(chosen, 1):
        if parent == at:
            trunk.append(number)
            at = number
    order = [*trunk, *(number for number in range(1, len(chosen) + 1) if number not in set(trunk))]
    renamed = {old: new for new, old in enumerate(order, 1)} | {0: 0}
    return DraftTree([chosen[old - 1][1] for old in order], [renamed[chosen[old - 1][0]] for old in order])
