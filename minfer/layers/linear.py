"""`Linear`: y = x W^T + b, where W may be several of the checkpoint's matrices stacked into one product.

Stacking (q, k, v into qkv; gate, up into gate_up) reads the activations once and gives the kernel a wider matrix. The parts
arrive in any order; when the last one is there, the op table repacks the whole once and the parts are let go.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from minfer.errors import ModelLoadError
from minfer.kernels import Ops, Weight
from minfer.layers.loading import Take, Tensorlike, take_vector
from minfer.quant import PackedWeight


class Linear(nn.Module):
    """`parts` maps the checkpoint's names to their number of outputs, in stacking order; by default the layer is its own part."""

    weight: Weight
    bias: torch.Tensor | None

    def __init__(
        self, ops: Ops, inputs: int, outputs: int, *, device: torch.device, bias: bool = False, parts: dict[str, int] | None = None
    ) -> None:
        super().__init__()
        self.ops = ops
        self.inputs = inputs
        self.outputs = outputs
        self.device = device
        self.parts = parts
        self.bias = torch.empty(outputs, dtype=ops.dtype, device=device) if bias else None
        self._arrived: dict[str, PackedWeight | None] = {}
        self._dense: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(x, self.weight, self.bias)

    def slots(self, parent: str, name: str) -> dict[str, Take]:
        slots: dict[str, Take] = {}
        first = 0
        for part, rows in (self.parts or {name: self.outputs}).items():
            slots[f"{parent}{part}.weight"] = partial(self._take_matrix, part, first, rows)
            if self.bias is not None:
                slots[f"{parent}{part}.bias"] = partial(self._take_bias, first, rows)
            first += rows
        return slots

    def _take_bias(self, first: int, rows: int, tensor: Tensorlike) -> None:
        assert self.bias is not None, "only a layer with a bias offers a slot for one"
        self.bias[first : first + rows] = take_vector(tensor, rows, self.ops.dtype, self.device)

    def _take_matrix(self, part: str, first: int, rows: int, tensor: Tensorlike) -> None:
        if tuple(tensor.shape) != (rows, self.inputs):
            raise ModelLoadError(f"has shape {list(tensor.shape)}, expected [{rows}, {self.inputs}]")
        if isinstance(tensor, PackedWeight):
            self._arrived[part] = tensor
        else:
            if self._dense is None:
                self._dense = torch.empty(self.outputs, self.inputs, dtype=self.ops.dtype, device=self.device)
            self._dense[first : first + rows] = tensor  # casts and moves; the part itself is never kept
            self._arrived[part] = None
        if len(self._arrived) == len(self.parts or (part,)):
            self.weight = self.ops.prepare(self._stacked())
            self._arrived.clear()
            self._dense = None

    def _stacked(self) -> Tensorlike:
        names = list(self.parts or self._arrived)
        packed = [p for name in names if (p := self._arrived[name]) is not None]
        if not packed:
            assert self._dense is not None, "every dense part was copied into it"
            return self._dense
        if self._dense is not None or any(p.scheme != packed[0].scheme for p in packed):
            return self._dense_from_mixed(names)
        return PackedWeight.concatenate(packed) if len(packed) > 1 else packed[0]

    def _dense_from_mixed(self, names: list[str]) -> torch.Tensor:
        """Parts quantised differently can't be one packed matrix (a GGUF may mix types within q, k, v): make them dense."""
        if self._dense is None:
            self._dense = torch.empty(self.outputs, self.inputs, dtype=self.ops.dtype, device=self.device)
        first = 0
        for name in names:
            part, rows = self._arrived[name], (self.parts or {name: self.outputs})[name]
            if part is not None:
                self._dense[first : first + rows] = part.dequantize(self.ops.dtype)
            first += rows
        return self._dense
