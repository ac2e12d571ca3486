"""A mixture of experts in plain torch: each expert in turn, with the tokens that chose it.

It works with any prepared matrices, and asks the device which experts were chosen: a step with it can't be captured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minfer.kernels.ops import Experts, Weight
from minfer.kernels.reference.elementwise import act_mul


def route(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """router_logits[T, E] -> the chosen experts [T, top_k] int64, the highest first, and their shares [T, top_k] float32 or wider."""
    shares = router_logits.softmax(-1, dtype=torch.promote_types(router_logits.dtype, torch.float32))
    chosen = torch.sort(router_logits, dim=-1, descending=True, stable=True).indices[:, :top_k]  # of equals the lower number first
    own = shares.gather(1, chosen)
    return chosen, own / own.sum(-1, keepdim=True) if renormalize else own


class LoopedExperts(Experts):
    def __init__(self, gate_up: Sequence[Weight], down: Sequence[Weight]) -> None:
        self.gate_up, self.down = list(gate_up), list(down)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in (*self.gate_up, *self.down))

    def moe(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        top_k: int,
        renormalize: bool,
        kind: str,
        shared: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        chosen, shares = route(router_logits, top_k, renormalize)
        total = torch.zeros(x.shape, dtype=shares.dtype, device=x.device)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            inner = act_mul(self.gate_up[expert].linear(x[token], None), kind)
            total[token] += self.down[expert].linear(inner, None) * shares[token, place, None]
        if shared is not None:
            y, gate = shared
            total += torch.sigmoid(gate.to(total.dtype)) * y
        return total.to(x.dtype)
