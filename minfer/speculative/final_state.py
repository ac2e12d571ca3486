"""Medusa and ReDrafter as proposers: all they need of a request is the target's final state of its newest computed token.

So there is no KV and nothing to follow but one row a request. Tokens are drawn head by head (or turn by turn of the cell) with
the request's own parameters and the random number of their position, as every other proposer does.

Medusa's heads don't know each other's guesses, so with `top_k` above 1 every guess for a place may follow every one for the place
before: of that tree the likeliest nodes are drafted. (ReDrafter's paper searches beams of its cell; here it drafts a chain.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minfer.models import FINAL
from minfer.models.medusa import MedusaHeads
from minfer.models.redrafter import ReDrafterHead
from minfer.sampling import Sampler, SamplingRow
from minfer.scheduler import Request, ScheduledRequest
from minfer.speculative.policy import Bar
from minfer.speculative.tree import DraftTree, Opinion, Sketch
from minfer.speculative.verify import DraftRow

Widen = Callable[[torch.Tensor], torch.Tensor]  # logits over the head's ids -> over the target's


class _FinalStateProposer:
    after: Sequence[int] = (FINAL,)
    tells_chances = True

    def __init__(self, sampler: Sampler, widen: Widen, token_ids: torch.Tensor | None, deepest: int | None, top_k: int) -> None:
        self._sampler, self._widen, self._token_ids = sampler, widen, token_ids
        self._deepest, self._top_k = deepest, top_k
        self._step = torch.empty(0)  # the states of the last step, [T, H]
        self._rows: dict[Request, int] = {}  # which of them is a request's newest

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """These heads have no KV."""

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> None:
        self._step = states[0].clone()
        self._rows = {item.request: own[-1] for item, own in zip(scheduled, rows, strict=True)}

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int] | DraftTree]:
        deepest = max(counts, default=0) if self._deepest is None else self._deepest
        sketches = [Sketch(min(count, deepest), bar) for count in counts]
        going = [index for index, sketch in enumerate(sketches) if sketch.wants_more]
        state = self._step[[self._rows[requests[index]] for index in going]]
        memory = torch.zeros_like(state)
        depth = 0
        while going:
            newest = [(sketches[index].drawn or requests[index].token_ids[-1:])[-1] for index in going]
            logits, memory = self._guess(depth, state, memory, newest)
            opinion = Opinion(logits, self._token_ids, self._top_k)
            rows: list[SamplingRow] = [DraftRow(requests[index], sketches[index].drawn) for index in going]
            sampled = self._sampler.sample(self._widen(logits), rows)
            for row, (index, token) in enumerate(zip(going, sampled.token_ids, strict=True)):
                if row in sampled.failed:  # a mask left nothing of what the head can say
                    sketches[index].close()
                else:
                    sketches[index].add(opinion.guesses(row, token, rows[row]))
            depth += 1
            staying = [row for row, index in enumerate(going) if sketches[index].wants_more]
            if len(staying) < len(going):
                state, memory = state[staying], memory[staying]
                going = [going[row] for row in staying]
        if self._top_k > 1:
            return [sketch.tree(count, everywhere=True) for sketch, count in zip(sketches, counts, strict=True)]
        return [sketch.chain() for sketch in sketches]

    def _guess(self, depth: int, state: torch.Tensor, memory: torch.Tensor, newest: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """state[R, H] of the target, memory[R, H] of this pass, the newest tokens -> logits[R, Vd] of the next ones, and the memory."""
        raise NotImplementedError


class MedusaProposer(_FinalStateProposer):
    def __init__(self, heads: MedusaHeads, sampler: Sampler, widen: Widen, token_ids: torch.Tensor | None, top_k: int) -> None:
        super().__init__(sampler, widen, token_ids, len(heads.lm_heads), top_k)
        self._heads = heads

    def _guess(self, depth: int, state: torch.Tensor, memory: torch.Tensor, newest: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._heads(depth, state), memory


class ReDrafterProposer(_FinalStateProposer):
    """`embed` is the target's."""

    def __init__(
        self,
        head: ReDrafterHead,
        embed: Callable[[torch.Tensor], torch.Tensor],
        sampler: Sampler,
        widen: Widen,
        token_ids: torch.Tensor | None,
    ) -> None:
        super().__init__(sampler, widen, token_ids, None, 1)
        self._head, self._embed = head, embed

    def _guess(self, depth: int, state: torch.Tensor, memory: torch.Tensor, newest: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self._head.advance(self._embed(torch.tensor(newest, dtype=torch.int32, device=state.device)), memory)
        return self._head(state, memory), memory
