"""The verifier: draws the model's own token at every drafted position and keeps drafts for as long as they are that token.

    sequence           ... the cat        computed in one step:   cat   sat   on   a
    drafts                  sat on a      the model then draws:   sat   on   the   -
    kept: sat, on (as guessed) and `the` (the model's own word where the guess was wrong)

For a proposer that names one token per position, as all of them here do, this *is* rejection sampling with the residual
distribution (arXiv 2211.17192): the draft x is kept with probability p(x), and where it isn't, the token has distribution p
restricted to the others. It needs nothing of its own, though: each position is drawn by the sampler from its own logits, with
its own penalties, masks and log-probabilities, and with the random number that belongs to (seed, position). So the output is
not only distributed as without speculation: with the same logits it is the same output, token for token.

Drafts that branch are the same: all guesses for one position share its random number, so at most one of them is what the model
draws behind the one before, and the walk from draft to draft is the walk of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

from minfer.sampling import SamplingRow
from minfer.sampling_params import SamplingParams


class DraftRow:
    """A request as it will be if its first drafts are right: the `SamplingRow` of a later position."""

    __slots__ = ("_request", "output_token_ids")

    def __init__(self, request: SamplingRow, drafts: Sequence[int]) -> None:
        self._request = request
        self.output_token_ids = [*request.output_token_ids, *drafts]

    @property
    def params(self) -> SamplingParams:
        return self._request.params

    @property
    def seed(self) -> int:
        return self._request.seed

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        return self._request.prompt_token_ids

    @property
    def eos_token_ids(self) -> Sequence[int]:
        return self._request.eos_token_ids

    @property
    def position(self) -> int:
        return len(self._request.prompt_token_ids) + len(self.output_token_ids)


def accepted(drafts: Sequence[int], parents: Sequence[int], drawn: Sequence[int]) -> list[int]:
    """Which of `drafts`, from 1, stand. `drawn[0]` is the model's token for the next position, `drawn[i]` the one behind draft i.

    `parents[i]`: what draft i + 1 follows, a draft before it or 0 for nothing; () where each follows the one before.
    """
    kept: list[int] = []
    at = 0
    for number, draft in enumerate(drafts, 1):
        if (parents[number - 1] if parents else number - 1) == at and draft == drawn[at]:
            kept.append(number)
            at = number
    return kept


def way(number: int, parents: Sequence[int]) -> list[int]:
    """The drafts, from 1, from the first to this one, each followed by the next."""
    if not parents:
        return list(range(1, number + 1))
    found = []
    while number:
        found.append(number)
        number = parents[number - 1]
    return found[::-1]


def trunk(num_drafts: int, parents: Sequence[int]) -> int:
    """How many of the first drafts follow each other: the rest branch off."""
    return next((number for number, parent in enumerate(parents) if parent != number), num_drafts)
