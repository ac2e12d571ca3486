"""The arena of packed weights: pieces don't overlap, and live as long as somebody holds them."""

from __future__ import annotations

import gc

import torch

from minfer.kernels.cpu.arena import WeightArena


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
    small, large, after = arena.empty(16, torch.uint8), arena.empty(65 << 20, torch.uint8), arena.empty(16, torch.uint8)
    small.fill_(1), after.fill_(3)
    large[:1], large[-1:] = 2, 2
    assert large.shape == (65 << 20,)
    assert [int(small.sum()), int(large[0]), int(large[-1]), int(after.sum())] == [16, 2, 2, 48]


def test_pieces_outlive_the_arena() -> None:
    arena = WeightArena()
    piece = arena.empty(1 << 20, torch.float32).fill_(7)
    del arena
    gc.collect()
    assert bool((piece == 7).all())
