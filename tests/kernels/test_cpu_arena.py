"""The arena of packed weights: pieces don't overlap, and live as long as somebody holds them."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path

import pytest
import torch

from minfer.kernels.cpu import arena as module
from minfer.kernels.cpu.arena import WeightArena, return_free_memory


def test_pieces_keep_what_was_written_to_them() -> None:
    arena = WeightArena()
    pieces = [
        arena.empty(count, dtype).fill_(n)
        for n, (count, dtype) in enumerate([(5, torch.uint8), (4097, torch.float32), (1, torch.bfloat16)])
    ]
    assert [int(piece.min()) for piece in pieces] == [int(piece.max()) for piece in pieces] == [0, 1, 2]
    assert all(piece.data_ptr() % 4096 == 0 for piece in pieces)


def test_a_piece_larger_than_a_mapping_gets_its_own() -> None:
    arena = WeightArena()
    size = module._CHUNK + 1
    small, large, after = arena.empty(16, torch.uint8), arena.empty(size, torch.uint8), arena.empty(16, torch.uint8)
    small.fill_(1), after.fill_(3)
    large[:1], large[-1:] = 2, 2
    assert large.shape == (size,)
    assert [int(small.sum()), int(large[0]), int(large[-1]), int(after.sum())] == [16, 2, 2, 48]


def test_pieces_outlive_the_arena() -> None:
    arena = WeightArena()
    piece = arena.empty(1 << 20, torch.float32).fill_(7)
    del arena
    gc.collect()
    assert bool((piece == 7).all())


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim") or "asan" in os.environ.get("LD_PRELOAD", ""), reason="needs glibc's allocator"
)
def test_holes_in_the_heap_go_back_to_the_system() -> None:
    def resident() -> int:
        found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) << 10

    blocks = [torch.ones(60_000, dtype=torch.uint8) for _ in range(1000)]
    last = blocks.pop()  # holds the end of the heap, so that nothing below goes back by itself
    blocks.clear()
    before = resident()
    return_free_memory()
    assert resident() < before - 30_000_000
    assert bool(last.all())
