"""The gated feed-forward block, SwiGLU (Shazeer 2020): down(act(gate(x)) * up(x))."""

from __future__ import annotations

import torch
from torch import nn

from minfer.batch import LoraRows
from minfer.kernels import Ops, Rows, Weight
from minfer.layers.linear import Linear
from minfer.model_config import ModelConfig


class GatedMLP(nn.Module):
    """`inner`: its width where it isn't the config's."""

    def __init__(self, ops: Ops, config: ModelConfig, *, device: torch.device, inner: int | None = None) -> None:
        super().__init__()
        self.ops = ops
        self.kind = config.hidden_act
        hidden, inner, bias = config.hidden_size, inner or config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(ops, hidden, 2 * inner, bias=bias, parts={"gate_proj": inner, "up_proj": inner}, device=device)
        self.down_proj = Linear(ops, inner, hidden, bias=bias, device=device)

    @property
    def reader(self) -> Weight | None:
        return self.gate_up_proj.reader

    def forward(self, x: Rows, rows: LoraRows | None) -> torch.Tensor:
        inner = self.ops.act_mul(self.gate_up_proj(x, rows), self.kind, self.down_proj.reader)
        return self.down_proj(inner, rows)  # type: ignore[no-any-return]
