"""Token embedding and output head. A tied model has one matrix for both: the head borrows the embedding's."""

from __future__ import annotations

import torch
from torch import nn

from minfer.errors import ModelLoadError
from minfer.kernels import Ops, Weight
from minfer.layers.linear import Linear
from minfer.layers.loading import Take, Tensorlike
from minfer.quant import PackedWeight


class Embedding(nn.Module):
    """ids[T] -> [T, H]."""

    weight: Weight

    def __init__(self, ops: Ops, vocab_size: int, hidden_size: int, *, device: torch.device) -> None:
        super().__init__()
        self.ops = ops
        self.shape = (vocab_size, hidden_size)
        self.device = device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.ops.embedding(ids, self.weight)

    def slots(self, parent: str, name: str) -> dict[str, Take]:
        return {f"{parent}{name}.weight": self._take}

    def _take(self, tensor: Tensorlike) -> None:
        if tuple(tensor.shape) != self.shape:
            raise ModelLoadError(f"has shape {list(tensor.shape)}, expected {list(self.shape)}")
        if not isinstance(tensor, PackedWeight):
            tensor = tensor.to(device=self.device, dtype=self.ops.dtype, copy=True)
        self.weight = self.ops.prepare(tensor)


class OutputHead(Linear):
    """hidden[S, H] -> logits[S, V] in float32, whatever the model's dtype."""

    def __init__(self, ops: Ops, vocab_size: int, hidden_size: int, *, device: torch.device, tied_to: Embedding | None) -> None:
        super().__init__(ops, hidden_size, vocab_size, device=device)
        # In a tuple, because a module held directly would become a child and offer the embedding's slot under a second name.
        self._tied = (tied_to,)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # no adapter changes it
        (embedding,) = self._tied
        return self.ops.linear(hidden, self.weight if embedding is None else embedding.weight).float()

    def slots(self, parent: str, name: str) -> dict[str, Take]:
        return super().slots(parent, name) if self._tied == (None,) else {}
