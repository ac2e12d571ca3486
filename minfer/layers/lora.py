"""Gives a model's layers their adapters: each `Linear` takes, of every adapter, what carries the names of its parts.

As with weights, a layer's place in the model is the name that the adapter's file uses (`model.layers.3.mlp.down_proj`), and the parts of a
fused one are found under their own names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from minfer.errors import ModelLoadError
from minfer.kernels.lora import LoraPart, LoraWeights
from minfer.layers.linear import Linear
from minfer.loader.lora import LoraCheckpoint

# The layers that are told which rows go through which adapter.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_adapters(model: nn.Module, adapters: Sequence[LoraCheckpoint]) -> None:
    """Adapter number i of a batch, from 1, becomes `adapters[i - 1]`.

    Raises ModelLoadError for one that changes anything but the matrices of attention and MLP, or doesn't fit them.
    """
    left = [dict(adapter.matrices) for adapter in adapters]
    for path, layer in model.named_modules():
        parent, _, name = path.rpartition(".")
        if not isinstance(layer, Linear):
            continue
        parts = layer.parts or {name: layer.outputs}
        if any(part not in TARGETS for part in parts):
            continue
        shapes = {f"{parent}.{part}": (rows, layer.inputs) for part, rows in parts.items()}
        taken = [[_take(adapter, own, *item) for item in shapes.items()] for adapter, own in zip(adapters, left, strict=True)]
        if any(part is not None for own in taken for part in own):
            stacked = LoraWeights.stack(taken, layer.inputs, list(parts.values()), layer.ops.dtype, layer.device)
            layer.lora = layer.ops.prepare_lora(stacked)
    for adapter, rest in zip(adapters, left, strict=True):
        if rest:
            raise ModelLoadError(
                f"the LoRA adapter {adapter.name!r} changes {min(rest)!r}, which is not supported for this model; "
                f"an adapter may change {', '.join(TARGETS)}"
            )


def _take(
    adapter: LoraCheckpoint, left: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str, shape: tuple[int, int]
) -> LoraPart | None:
    pair = left.pop(name, None)
    if pair is None:
        return None
    a, b = pair
    if (b.shape[0], a.shape[1]) != shape:
        raise ModelLoadError(
            f"the LoRA adapter {adapter.name!r} was made for another model: its {name} is {b.shape[0]} x {a.shape[1]}, "
            f"and the model's is {shape[0]} x {shape[1]}"
        )
    return LoraPart(a, b, adapter.scale)
