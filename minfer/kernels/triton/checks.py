"""What every wrapper checks before it launches: a kernel that is handed the wrong type or stride reads somebody else's memory.

The errors name the tensor. Nothing here touches the device, so a check costs a microsecond and no synchronisation.
"""

from __future__ import annotations

import torch

from minfer.errors import ConfigError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: what a tile's side has to be."""
    return 1 << max(0, n - 1).bit_length()


def row_stride(name: str, tensor: torch.Tensor, like: torch.Tensor | None = None) -> int:
    """Elements between rows of a float tensor whose rows are contiguous; of `like`'s type and on its device, where given."""
    if tensor.dtype not in FLOATS:
        raise ConfigError(f"{name} must be float32, bfloat16 or float16 for the triton kernels, not {tensor.dtype}")
    if like is not None:
        if tensor.dtype != like.dtype:
            raise ConfigError(f"{name} must be {like.dtype} as its companion is, not {tensor.dtype}")
        on_device(name, tensor, like)
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if stride != expected and size != 1:
            raise ConfigError(f"{name} must be contiguous but for its first axis, not {list(tensor.shape)} by {list(tensor.stride())}")
        expected *= size
    return tensor.stride(0)


def shaped(name: str, tensor: torch.Tensor, *shape: int) -> None:
    if tuple(tensor.shape) != shape:
        raise ConfigError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")


def index(name: str, tensor: torch.Tensor, like: torch.Tensor, *dtypes: torch.dtype) -> None:
    """An index tensor of one of these types, contiguous along its last axis, on `like`'s device."""
    if tensor.dtype not in dtypes or (tensor.numel() > 1 and tensor.stride(-1) != 1):
        raise ConfigError(f"{name} must be contiguous {' or '.join(str(d) for d in dtypes)}, not {tensor.dtype} by {list(tensor.stride())}")
    on_device(name, tensor, like)


def on_device(name: str, tensor: torch.Tensor, like: torch.Tensor) -> None:
    if tensor.device != like.device:
        raise ConfigError(f"{name} is on {tensor.device}, but its companion on {like.device}")
