"""Memory in huge pages, where the system grants them: for packed matrices, and for a large KV cache.

Decoding streams every weight once a token. Over pages of 4 KiB the processor's own prefetching stops at each page's end and
every page costs a walk of the page table, two-dimensional in a virtual machine; over pages of 2 MiB the same loop reads a
twentieth to a sixth faster. A page is huge only if all of it lies in one mapping, and most matrices are smaller than one, so they are cut
one after the other from large mappings.

A KV cache gains in another way: it is touched for the first time while prompts are computed, and a page fault for every 4 KiB cost
6% of a prompt's time. Each layer's K and V lie in memory of their own, so that a huge page each is a waste in a small cache, and
only a large one is asked to take them.

Left out: giving memory back for single matrices. They are made at load and live as long as their model.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch

_CHUNK = 512 << 20  # of addresses: only what is touched takes memory, and every chunk's last huge page is wasted in part
_HUGE_PAGE = 2 << 20
_ALIGNMENT = 4096
_LARGE = 4 * _HUGE_PAGE  # of a tensor this long, rounding up to huge pages wastes an eighth on average


class WeightArena:
    """Hands out uninitialised memory. A mapping is returned to the system when the last tensor cut from it is gone."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """[count] of dtype, on a page of its own."""
        size = count * dtype.itemsize
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        if start + size > self._chunk.nbytes:
            self._chunk, start = _map(max(size, _CHUNK)), 0
        self._used = start + size
        return self._chunk[start : start + size].view(dtype)


def ask_for_huge_pages(tensor: torch.Tensor) -> None:
    """Has the system back a large CPU tensor that wasn't written yet with huge pages. A wish: where it can't, nothing changes."""
    if tensor.nbytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = -(-tensor.data_ptr() // _ALIGNMENT) * _ALIGNMENT
    madvise(start, tensor.data_ptr() + tensor.nbytes - start, mmap.MADV_HUGEPAGE)


def return_free_memory() -> None:
    """Gives the system what the C library's allocator holds free; elsewhere than in glibc nothing happens.

    Reading and packing matrices leaves hundreds of megabytes of holes in its heap, which nothing later fits.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _map(size: int) -> torch.Tensor:
    """A private mapping that begins on a huge page; what is never touched takes no memory."""
    mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: the same memory, read a little slower
            mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    return memory[start : start + size]
