"""From a loaded head to its proposer: who embeds, who makes logits, and the head's ids among the target's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from minfer.kernels import Ops
from minfer.models import Model
from minfer.models.eagle import Eagle3Head, EagleHead
from minfer.models.medusa import MedusaHeads
from minfer.runner import BatchBuilder, DraftHead, HeadRunner
from minfer.runner.graphs import Graph, Step
from minfer.sampling import Sampler
from minfer.speculative.draft_model import Reserve
from minfer.speculative.eagle import EagleProposer
from minfer.speculative.final_state import MedusaProposer, ReDrafterProposer


def head_proposer(
    head: DraftHead,
    target: Model,
    builder: BatchBuilder,
    sampler: Sampler,
    reserve: Reserve,
    max_tokens: int,
    max_requests: int,
    top_k: int,
    ops: Ops,
    graphs: Callable[[Step], Graph] | None = None,
    *,
    record: bool,
) -> EagleProposer | MedusaProposer | ReDrafterProposer:
    """`max_tokens`, `max_requests`: the most that `builder` takes in one batch. `top_k`: how many tokens are tried at one place. `record`:
    whether passes of a head are recorded where its `ops` can be; `graphs`: the device's own way of doing that.
    """
    module, ids, widen = head.module, head.token_ids, widening(head.token_ids, sampler.vocab_size)
    if isinstance(module, MedusaHeads):
        return MedusaProposer(module, sampler, widen, ids, top_k)
    if not isinstance(module, (EagleHead, Eagle3Head)):
        return ReDrafterProposer(module, target.model.embed_tokens, sampler, widen, ids)
    assert head.cache is not None, "load_model gives an EAGLE head its cache"
    output = getattr(module, "lm_head", None)

    def logits(x: torch.Tensor) -> torch.Tensor:
        return target.compute_logits(x) if output is None else output(x)

    embed = getattr(module, "embed_tokens", target.model.embed_tokens)
    runner = HeadRunner(module, head.cache, builder, embed, max_tokens, max_requests, ops if record else None, graphs)
    best = ops.likeliest or likeliest
    return EagleProposer(runner, logits, best, widen, ids, sampler, reserve, max_tokens, top_k, head.after)


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`Ops.likeliest` where no backend has it."""
    best, tokens = logits.max(-1)
    return tokens, (best - logits.logsumexp(-1)).exp_()


def widening(token_ids: torch.Tensor | None, vocab_size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Logits [S, Vd] over `token_ids` -> [S, V] over all ids, those that the head can't say being -inf."""

    def widen(logits: torch.Tensor) -> torch.Tensor:
        if token_ids is None:
            return logits
        return logits.new_full((logits.shape[0], vocab_size), -math.inf).index_copy_(1, token_ids, logits)

    return widen
