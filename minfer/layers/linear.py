"""`Linear`: y = x W^T + b, where W may be several of the checkpoint's matrices stacked into one product.

Stacking (q, k, v into qkv; gate, up into gate_up) reads the activations once and gives the kernel a wider matrix. The parts
arrive in any order; when the last one is there, the op table repacks the whole once and the parts are let go. Parts that are
quantised differently (a GGUF mixes types within q, k, v) stay products of their own, which write into one output.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from minfer.batch import LoraRows
from minfer.errors import ModelLoadError
from minfer.kernels import Ops, Rows, Weight
from minfer.kernels.lora import LoraWeights
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
        self.lora: LoraWeights | None = None  # what adapters add, see lora.py
        self._arrived: dict[str, Tensorlike] = {}
        self._dense: torch.Tensor | None = None

    @property
    def reader(self) -> Weight | None:
        """The matrix, where nothing else looks at the layer's input: what the op before it is told. Adapters would."""
        return self.weight if self.lora is None else None

    def forward(self, x: Rows, rows: LoraRows | None = None) -> torch.Tensor:
        y = self.ops.linear(x, self.weight, self.bias)
        if rows is not None and self.lora is not None:
            assert isinstance(x, torch.Tensor), "a layer with adapters is no reader"
            self.ops.lora(y, x, self.lora, rows)
        return y

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
            self._arrived[part] = self._dense[first : first + rows]
            self._dense[first : first + rows] = tensor  # casts and moves; the part itself is never kept
        if len(self._arrived) == len(self.parts or (part,)):
            self.weight = self.ops.prepare_stack(self._runs())
            self._arrived.clear()
            self._dense = None

    def _runs(self) -> list[Tensorlike]:
        """The parts in stacking order, neighbours that are quantised alike made one matrix."""
        arrived = [self._arrived[name] for name in self.parts or self._arrived]
        packed = [part for part in arrived if isinstance(part, PackedWeight)]
        if not packed:
            assert self._dense is not None, "every dense part was copied into it"
            return [self._dense]
        runs: list[list[Tensorlike]] = []
        for part in arrived:
            if runs and _alike(runs[-1][-1], part):
                runs[-1].append(part)
            else:
                runs.append([part])
        return [PackedWeight.concatenate(run) if len(run) > 1 else run[0] for run in runs]  # type: ignore[arg-type]


def _alike(one: Tensorlike, other: Tensorlike) -> bool:
    return isinstance(one, PackedWeight) and isinstance(other, PackedWeight) and one.is_alike(other)
