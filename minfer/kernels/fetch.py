"""Bringing results to the host without waiting for them: begun when they are launched, waited for when they are needed.

On a GPU `tensor.tolist()` stops the host until everything that was launched before is done. Here the copy is launched behind the kernels
that make the tensor, into pinned memory, with an event behind it; the host goes on launching, and waits for that event alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Arrival = Callable[[], list[Any]]  # waits, and gives the values as Python's own: a list for each tensor


def fetch(*tensors: torch.Tensor) -> Arrival:
    """Begins to bring tensors of one device to the host."""
    if tensors[0].device.type == "cpu":
        return lambda: [tensor.tolist() for tensor in tensors]
    hosts = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    for host, tensor in zip(hosts, tensors, strict=True):
        host.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> list[Any]:
        arrived.synchronize()
        return [host.tolist() for host in hosts]

    return wait
