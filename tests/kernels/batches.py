"""Batches for kernel tests: requests of given lengths over shuffled blocks, and caches to go with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minfer.batch import Batch
from minfer.kvcache import LayerCache


def make_batch(lengths: Sequence[tuple[int, int]], block_size: int, num_blocks: int, seed: int = 0) -> Batch:
    """One request for each (new tokens, tokens in all), its blocks drawn without replacement from the pool."""
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).int()
    width = max((-(-total // block_size) for _, total in lengths), default=0)
    tables = torch.zeros(len(lengths), width, dtype=torch.int32)
    start, taken, positions, slots = [0], 0, [], []
    for row, (new, total) in enumerate(lengths):
        blocks = -(-total // block_size)
        tables[row, :blocks] = free[taken : taken + blocks]
        taken += blocks
        at = torch.arange(total - new, total)
        positions.append(at.int())
        slots.append(tables[row][at // block_size].long() * block_size + at % block_size)
        start.append(start[-1] + new)
    return Batch(
        token_ids=torch.zeros(start[-1], dtype=torch.int32),
        positions=torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int32),
        slots=torch.cat(slots) if slots else torch.zeros(0, dtype=torch.int64),
        query_start=torch.tensor(start, dtype=torch.int32),
        seq_lens=torch.tensor([total for _, total in lengths], dtype=torch.int32),
        block_tables=tables,
        logits_at=torch.zeros(0, dtype=torch.int64),
        query_lens_host=[new for new, _ in lengths],
        seq_lens_host=[total for _, total in lengths],
    )


def make_cache(num_blocks: int, kv_heads: int, block_size: int, dim: int, dtype: torch.dtype, seed: int = 0) -> LayerCache:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_blocks, kv_heads, block_size, dim)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return LayerCache(k, v)
