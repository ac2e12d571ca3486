"""The bytes of the KV cache: one K and one V tensor per layer, cut into blocks.

    layer.k, layer.v : [num_blocks, kv_heads, block_size, head_dim]

A *block* holds `block_size` consecutive tokens of one sequence; a *slot* is block x block_size + offset. Heads come before
tokens, so that what one head reads of a block is contiguous. Which block belongs to whom is the scheduler's business
(`scheduler/block_pool.py`, plain integers); this file never learns about requests.

The memory is taken from the system once and never initialised: a slot is always written before it is read, and untouched
pages cost no resident memory on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minfer.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LayerCache:
    """K and V of one layer, [num_blocks, kv_heads, block_size, head_dim] each."""

    k: torch.Tensor
    v: torch.Tensor

    @property
    def block_size(self) -> int:
        return self.k.shape[2]


class KVCache:
    """All layers' blocks. `block_bytes` is what one block costs over all layers, K and V together."""

    def __init__(self, model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (num_blocks, model.num_kv_heads, block_size, model.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.layers = [
            LayerCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(model.num_layers)
        ]

    @staticmethod
    def block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        return model.kv_bytes_per_token(dtype.itemsize) * block_size

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination): the write half of copy-on-write."""
        if not copies:
            return
        sources, destinations = (list(side) for side in zip(*copies, strict=True))
        for layer in self.layers:
            layer.k[destinations] = layer.k[sources]
            layer.v[destinations] = layer.v[sources]
