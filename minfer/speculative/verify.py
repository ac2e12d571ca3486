"""The verifier: draws the model's own token at every drafted position and keeps drafts for as long as they are that token.

    sequence           ... the cat        computed in one step:   cat   sat   on   a
    drafts                  sat on a      the model then draws:   sat   on   the   -
    kept: sat, on (as guessed) and `the` (the model's own word where the guess was wrong)

For a proposer that names one token per position, as all of them here do, this *is* rejection sampling with the residual
distribution (arXiv 2211.17192): the draft x is kept with probability p(x), and where it isn't, the token has distribution p
restricted to the others. It needs nothing of its own, though: each position is drawn by the sampler from its own logits, with
its own penalties, masks and log-probabilities, and with the random number that belongs to (seed, position). So the output is
not only distributed as without speculation: with the same logits it is the same output, token for token.
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


def accepted(drafts: Sequence[int], drawn: Sequence[int]) -> int:
    """How many of `drafts` stand, where `drawn` holds the model's token for each draft's position and one more."""
    for index, draft in enumerate(drafts):
        if draft != drawn[index]:
            return index
    return len(drafts)
