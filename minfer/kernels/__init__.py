"""Kernels: the op table and its backends. `select_ops` is the only thing the floors above need."""

from __future__ import annotations

import torch

from minfer.errors import ConfigError
from minfer.kernels.ops import Backend, Ops, Weight
from minfer.kernels.reference import ReferenceBackend

__all__ = ["Backend", "Ops", "Weight", "select_ops"]


def select_ops(device: torch.device, dtype: torch.dtype, backend: str = "auto", threads: int | None = None) -> Ops:
    """The table for one engine. `auto` lists every backend that fits the device, fastest first; a name takes that one only.

    `threads` bounds what a CPU backend uses; torch's own pool is one per process and is set only when asked.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if backend not in ("auto", "reference"):
        raise ConfigError(f"backend must be auto or reference, not {backend!r}")
    return Ops([ReferenceBackend()], dtype)
