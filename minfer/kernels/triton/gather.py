"""Embedding: rows of a dense matrix [V, K] by token id.

    grid (T, K / BLOCK); a program copies BLOCK contiguous values

2 T K values move and nothing is computed. A vocabulary times a hidden size passes 2^31 values in large models: offsets are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.kernels.triton.checks import index

_BLOCK = 1024


@triton.jit
def gather_kernel(ids_ptr, table_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    token = tl.load(ids_ptr + row).to(tl.int64)
    tl.store(out_ptr + row * width + at, tl.load(table_ptr + token * width + at, mask=inside), mask=inside)


def gather(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids[T] int32 or int64, table[V, K] contiguous -> [T, K]."""
    index("ids", ids, table, torch.int32, torch.int64)
    rows, width = ids.shape[0], table.shape[1]
    out = torch.empty((rows, width), dtype=table.dtype, device=table.device)
    if rows:
        gather_kernel[(rows, triton.cdiv(width, _BLOCK))](ids, table, out, width, BLOCK=_BLOCK, num_warps=4)
    return out
