"""A mixture of experts in place of the feed-forward block (Shazeer 2017; Mixtral, Jiang 2024; Qwen-MoE).

    shares = softmax(gate(x)), of which each token keeps the `experts_per_token` highest, divided by their sum or not
    y = sum over those experts e of  share_e * down_e(act(gate_e(x)) * up_e(x))
    y += sigmoid(shared_expert_gate(x)) * shared_expert(x)                        in families that have one

The router (`gate`) and the shared expert are ordinary products; choosing, sorting and multiplying is one op, `moe`. The children bear
the checkpoint's names. An expert's matrices are prepared as they come, each like any other matrix, and joined when the last is there, so
that no more than one layer is in memory twice.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from minfer.batch import LoraRows
from minfer.kernels import Experts, Ops
from minfer.layers.linear import Linear
from minfer.layers.loading import Take, Tensorlike
from minfer.layers.mlp import GatedMLP
from minfer.model_config import ModelConfig, MoEConfig


class MoE(nn.Module):
    def __init__(self, ops: Ops, config: ModelConfig, moe: MoEConfig, *, device: torch.device) -> None:
        super().__init__()
        self.ops = ops
        self.kind, self.top_k, self.renormalize = config.hidden_act, moe.experts_per_token, moe.norm_topk_prob
        hidden, shared = config.hidden_size, moe.shared_intermediate_size
        self.gate = Linear(ops, hidden, moe.num_experts, device=device)
        self.experts = ExpertMatrices(ops, hidden, moe, device=device)
        self.shared_expert = GatedMLP(ops, config, device=device, inner=shared) if shared else None
        self.shared_expert_gate = Linear(ops, hidden, 1, device=device) if shared else None

    reader = None  # its router reads what its experts do

    def forward(self, x: torch.Tensor, rows: LoraRows | None) -> torch.Tensor:
        """[T, H] -> [T, H]. Adapters may change the shared expert."""
        shared = None
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            shared = self.shared_expert(x, rows), self.shared_expert_gate(x)
        return self.ops.moe(x, self.gate(x), self.experts.weight, self.top_k, self.renormalize, self.kind, shared)


class ExpertMatrices(nn.Module):
    """The matrices of all experts of a layer: `weight` once the last has arrived."""

    weight: Experts

    def __init__(self, ops: Ops, hidden: int, moe: MoEConfig, *, device: torch.device) -> None:
        super().__init__()
        self.ops = ops
        inner, (gate, up, self._down) = moe.intermediate_size, moe.matrices
        # In a list, because as modules they would stay: after loading only the joined weight is of use.
        self._arriving = [
            (
                Linear(ops, hidden, 2 * inner, parts={gate: inner, up: inner}, device=device),
                Linear(ops, inner, hidden, device=device),
            )
            for _ in range(moe.num_experts)
        ]
        self._missing = 3 * moe.num_experts

    def slots(self, parent: str, name: str) -> dict[str, Take]:
        slots: dict[str, Take] = {}
        for number, (gate_up, down) in enumerate(self._arriving):
            inside = f"{parent}{name}.{number}."
            wanted = gate_up.slots(inside, "gate_up") | down.slots(inside, self._down)
            slots |= {tensor: partial(self._take, take) for tensor, take in wanted.items()}
        return slots

    def _take(self, take: Take, tensor: Tensorlike) -> None:
        take(tensor)
        self._missing -= 1
        if self._missing == 0:
            self.weight = self.ops.prepare_experts(
                [first.weight for first, _ in self._arriving], [last.weight for _, last in self._arriving]
            )
            self._arriving.clear()


def feed_forward(ops: Ops, config: ModelConfig, layer: int, *, device: torch.device) -> GatedMLP | MoE:
    """The block of this layer, which `config.mlp_name` names."""
    moe = config.moe_of(layer)
    return GatedMLP(ops, config, device=device) if moe is None else MoE(ops, config, moe, device=device)
