"""Kernels: the op table and its backends. `select_ops` is the only thing the floors above need."""

from __future__ import annotations

import functools
import logging

import torch

from minfer.config import Activations, AttentionBackend
from minfer.errors import ConfigError
from minfer.kernels.ops import Backend, Experts, Ops, Rows, Weight
from minfer.kernels.reference import ReferenceBackend

__all__ = ["Backend", "Experts", "Ops", "Rows", "Weight", "select_ops"]

logger = logging.getLogger("minfer.kernels")
BACKENDS = ("auto", "triton", "cpu", "reference")


def select_ops(
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    threads: int | None = None,
    activations: Activations = "auto",
    attention: AttentionBackend = "auto",
) -> Ops:
    """The table for one engine. `auto` lists every backend that fits the device, fastest first; a name takes that one only.

    `attention` names a library to do that op in the place of the first of them.
    `threads` bounds what a CPU backend uses. torch has one pool for the whole process: it gets that number where torch does the
    work, and one thread where the compiled kernels do it with a pool of their own, or the two would fight for the cores.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    backends: list[Backend] = []
    if attention == "flash_attn":
        from minfer.kernels.flash_attn import FlashAttnBackend

        backends.append(FlashAttnBackend(device, dtype))
    if threads is not None:
        torch.set_num_threads(threads)
    if backend == "reference":
        return Ops([*backends, ReferenceBackend()], dtype)
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        triton = _triton(device, dtype, activations, required=backend == "triton")
        if triton is not None:
            return Ops([*backends, triton, *([ReferenceBackend()] if backend == "auto" else [])], dtype)
    # Imported where used: a machine that serves from a GPU may have no compiled kernels, and need not load them.
    from minfer.kernels.cpu import FLOATS, CpuBackend
    from minfer.kernels.cpu.library import LibraryMissingError

    if device.type == "cpu" and dtype in FLOATS:
        try:
            backends.append(CpuBackend(threads, activation="none" if activations == "none" else "int8"))
            torch.set_num_threads(1)
        except LibraryMissingError as error:
            if backend == "cpu":
                raise ConfigError(f"backend cpu can't be used: {error}") from error
            _warn_once(f"using plain torch, which is several times slower: {error}")
    elif backend == "cpu":
        raise ConfigError(f"backend cpu computes on device cpu in float32, bfloat16 or float16, not on {device} in {dtype}")
    return Ops([*backends, *([ReferenceBackend()] if backend == "auto" else [])], dtype)


def _triton(device: torch.device, dtype: torch.dtype, activations: Activations, required: bool) -> Backend | None:
    try:
        from minfer.kernels.triton import TritonBackend
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        message = "backend triton needs the triton package: pip install 'minfer[triton]'"
        if required:
            raise ConfigError(message) from error
        _warn_once(f"using plain torch on {device}, which is several times slower: {message}")
        return None
    return TritonBackend(device, dtype, activations=activations)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
