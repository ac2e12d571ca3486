"""RMSNorm (Zhang & Sennrich 2019), with the residual addition that always precedes it folded in."""

from __future__ import annotations

import torch
from torch import nn

from minfer.kernels import Ops, Rows, Weight
from minfer.layers.loading import Take, Tensorlike, take_vector


class RMSNorm(nn.Module):
    weight: torch.Tensor

    def __init__(self, ops: Ops, size: int, eps: float, *, device: torch.device) -> None:
        super().__init__()
        self.ops = ops
        self.size = size
        self.eps = eps
        self.device = device

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, reader: Weight | None = None) -> tuple[Rows, torch.Tensor]:
        """x[T, H], residual[T, H] -> (norm(x + residual), x + residual). reader: as of `Ops.rms_norm`."""
        return self.ops.rms_norm(x, self.weight, self.eps, residual, reader)

    def slots(self, parent: str, name: str) -> dict[str, Take]:
        return {f"{parent}{name}.weight": self._take}

    def _take(self, tensor: Tensorlike) -> None:
        self.weight = take_vector(tensor, self.size, self.ops.dtype, self.device)
