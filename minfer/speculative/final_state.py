"""Medusa and ReDrafter as proposers: all they need of a request is the target's final state of its newest computed token.

So there is no KV and nothing to follow but one row a request. Tokens are drawn head by head (or turn by turn of the cell) with
the request's own parameters and the random number of their position, as every other proposer does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minfer.models import FINAL
from minfer.models.medusa import MedusaHeads
from minfer.models.redrafter import ReDrafterHead
from minfer.sampling import Sampler, SamplingRow
from minfer.scheduler import Request, ScheduledRequest
from minfer.speculative.verify import DraftRow

Widen = Callable[[torch.Tensor], torch.Tensor]  # logits over the head's ids -> over the target's


class _FinalStateProposer:
    after: Sequence[int] = (FINAL,)

    def __init__(self, sampler: Sampler, widen: Widen, deepest: int | None) -> None:
        self._sampler, self._widen, self._deepest = sampler, widen, deepest
        self._states: dict[Request, torch.Tensor] = {}  # [H] each

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """These heads have no KV."""

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[Sequence[torch.Tensor]]) -> None:
        self._states = {
            item.request: rows[0][item.request.num_computed_tokens - item.start - 1].clone()
            for item, rows in zip(scheduled, states, strict=True)
        }

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], counts: Sequence[int]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in requests]
        limits = [count if self._deepest is None else min(count, self._deepest) for count in counts]
        going = [index for index, limit in enumerate(limits) if limit > 0]
        state = torch.stack([self._states[requests[index]] for index in going]) if going else torch.empty(0)
        memory = torch.zeros_like(state)
        depth = 0
        while going:
            newest = [drafts[index][-1] if drafts[index] else requests[index].token_ids[-1] for index in going]
            logits, memory = self._guess(depth, state, memory, newest)
            rows: list[SamplingRow] = [DraftRow(requests[index], drafts[index]) for index in going]
            sampled = self._sampler.sample(self._widen(logits), rows)
            for row, (index, token) in enumerate(zip(going, sampled.token_ids, strict=True)):
                if row in sampled.failed:  # a mask left nothing of what the head can say
                    limits[index] = 0
                else:
                    drafts[index].append(token)
            depth += 1
            staying = [row for row, index in enumerate(going) if len(drafts[index]) < limits[index]]
            if len(staying) < len(going):
                state, memory = state[staying], memory[staying]
                going = [going[row] for row in staying]
        return drafts

    def _guess(self, depth: int, state: torch.Tensor, memory: torch.Tensor, newest: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """state[R, H] of the target, memory[R, H] of this pass, the newest tokens -> logits[R, Vd] of the next ones, and the memory."""
        raise NotImplementedError


class MedusaProposer(_FinalStateProposer):
    def __init__(self, heads: MedusaHeads, sampler: Sampler, widen: Widen) -> None:
        super().__init__(sampler, widen, len(heads.lm_heads))
        self._heads = heads

    def _guess(self, depth: int, state: torch.Tensor, memory: torch.Tensor, newest: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self._heads(depth, state), memory


class ReDrafterProposer(_FinalStateProposer):
    """`embed` is the target's."""

    def __init__(self, head: ReDrafterHead, embed: Callable[[torch.Tensor], torch.Tensor], sampler: Sampler, widen: Widen) -> None:
        super().__init__(sampler, widen, None)
        self._head, self._embed = head, embed

    def _guess(self, depth: int, state: torch.Tensor, memory: torch.Tensor, newest: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self._head.advance(self._embed(torch.tensor(newest, dtype=torch.int32, device=state.device)), memory)
        return self._head(state, memory), memory
