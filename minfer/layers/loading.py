"""How weights find their layers: every layer names the checkpoint tensors it wants, and takes each as it comes by.

A layer's place in the model *is* the Hugging Face name of its weights (`model.layers.3.mlp.down_proj`), so there is no table
of names to maintain. Only fused layers say more: the checkpoint's q_proj, k_proj and v_proj are `parts` of qkv_proj.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

import torch

from minfer.errors import ModelLoadError
from minfer.quant import PackedWeight

Tensorlike = torch.Tensor | PackedWeight
Take = Callable[[Tensorlike], None]


@runtime_checkable
class Loadable(Protocol):
    """A layer with weights of its own."""

    def slots(self, parent: str, name: str) -> dict[str, Take]:
        """Checkpoint tensor name -> what to do with it, for a layer called `name` inside `parent` (which ends in a dot)."""
        ...


def load_weights(model: torch.nn.Module, tensors: Iterable[tuple[str, Tensorlike]]) -> None:
    """Streams a checkpoint into a model. Raises ModelLoadError for a tensor nobody wants and for one that never came."""
    wanted: dict[str, Take] = {}
    for path, module in model.named_modules():
        if isinstance(module, Loadable):
            parent, _, name = path.rpartition(".")
            wanted.update(module.slots(parent + "." if parent else "", name))
    for name, tensor in tensors:
        take = wanted.pop(name, None)
        if take is None:
            raise ModelLoadError(f"the checkpoint has a tensor {name!r} that this model has no place for, or has it twice")
        try:
            take(tensor)
        except ModelLoadError as error:
            raise ModelLoadError(f"{name}: {error}") from error
    if wanted:
        missing = sorted(wanted)
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelLoadError(f"the checkpoint lacks the tensor {missing[0]!r}{more}")


def take_vector(tensor: Tensorlike, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A norm's weight or a bias: dense, of one axis, copied to where the model lives."""
    if isinstance(tensor, PackedWeight):
        raise ModelLoadError("is quantised, but norms and biases have to be plain tensors")
    if tuple(tensor.shape) != (size,):
        raise ModelLoadError(f"has shape {list(tensor.shape)}, expected [{size}]")
    return tensor.to(device=device, dtype=dtype, copy=True)
