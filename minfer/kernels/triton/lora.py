"""LoRA over mixed adapters: y += scale (x a^T) b, where each row has matrices of its own adapter, or none.

The rows come sorted by adapter and cut into tiles (`LoraRows`); a program meets one tile, so one adapter, and a row without an adapter is
in no tile. That is Punica's segmented gather (Chen et al., arXiv 2310.18547), with the rows' numbers in place of a sorted copy of x.

    lora_shrink   grid (tiles, parts, SPLITS)            x [BLOCK_M gathered rows, K]  .  a [RANK, K]^T    -> t [BLOCK_M, RANK] float32
    lora_expand   grid (tiles, N / BLOCK_N, parts)       t [BLOCK_M, RANK]  .  b [RANK, BLOCK_N]           -> added to y [gathered rows]

What it must move, for T rows of A adapters: A r (K + N) weights once a tile, x once and y twice. At decode the weights are all of it: 16 of
rank 16 on a projection of 4096 x 4096 are 4 MB, beside 32 MB of the projection in bfloat16. The 2 T r (K + N) operations are nothing.

Shrinking is a product with one narrow output: whole, a tile would be one program that reads its 128 KB alone, and most of the device
would idle. So K is cut into SPLITS, and the partial sums are added up in their order by those who expand: no atomics (Punica's and vLLM's
add so, in any order), and the cut depends on K only. Tiles of prompts have rows enough, and are not cut.

t is rounded to the model's type before it meets b, as in training, where both are layers of that type; float32 stays float32.

How many tiles there are is part of the grid. A step that is replayed from a CUDA graph has as many as there could be; those it doesn't
need say adapter 0, and their programs end at the first load. So do those of a part that the adapter leaves alone.

Tried, by what compilers made of it: the columns between which a part lies as mere numbers from memory: loads of b and y of 2 bytes, since
nobody knows that they are multiples of 16; hence ALIGNED, for the end as well, or the mask does the same. t of rank 128 at once, and tiles
of 64 rows by 128 columns: registers spill; so 32 of a rank at a time, and 64 columns. Left out: adding inside the product itself, which
would spare the second pass over y.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.batch import LoraRows
from minfer.errors import ConfigError
from minfer.kernels.lora import LoraWeights
from minfer.kernels.triton.checks import index, on_device, row_stride, shaped

SPLIT_INPUTS = 512  # of a part of K that one program reads, where rows are few
MOST_SPLITS = 16
FEW_ROWS = 16


@triton.jit
def lora_shrink_kernel(
    x_ptr, rows_ptr, tiles_ptr, a_ptr, ranks_ptr, t_ptr, total, x_stride,
    K: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, part, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    adapter = tl.load(tiles_ptr + tile * 3) - 1
    if adapter < 0:
        return
    if tl.load(ranks_ptr + adapter * PARTS + part) == 0:
        return
    first, count = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
    at, j, k = tl.arange(0, BLOCK_M), tl.arange(0, RANK), tl.arange(0, BLOCK_K)
    real = at < count
    row = tl.load(rows_ptr + first + at, mask=real, other=0).to(tl.int64)
    x_at = x_ptr + row[:, None] * x_stride + k[None, :]
    a_at = a_ptr + (adapter.to(tl.int64) * (PARTS * RANK) + part * RANK + j)[None, :] * K + k[:, None]
    acc = tl.zeros([BLOCK_M, RANK], tl.float32)
    share: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    for start in range(split * share, tl.minimum(split * share + share, K), BLOCK_K):
        if K % BLOCK_K:
            x = tl.load(x_at + start, mask=real[:, None] & (start + k < K)[None, :], other=0.0)
            a = tl.load(a_at + start, mask=(start + k < K)[:, None], other=0.0)
        else:
            x = tl.load(x_at + start, mask=real[:, None], other=0.0)
            a = tl.load(a_at + start)
        acc = tl.dot(x, a, acc, input_precision="ieee")
    t_row = (split * total + first + at).to(tl.int64) * (PARTS * RANK)
    tl.store(t_ptr + t_row[:, None] + part * RANK + j[None, :], acc, mask=real[:, None])


@triton.jit
def lora_expand_kernel(
    t_ptr, rows_ptr, tiles_ptr, b_ptr, scales_ptr, ranks_ptr, bounds_ptr, y_ptr, total, y_stride,
    N: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, SPLITS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    adapter = tl.load(tiles_ptr + tile * 3) - 1
    if adapter < 0:
        return
    if tl.load(ranks_ptr + adapter * PARTS + part) == 0:
        return
    begin, end = tl.load(bounds_ptr + part), tl.load(bounds_ptr + part + 1)
    if ALIGNED:
        begin, end = tl.multiple_of(begin, 16), tl.multiple_of(end, 16)
    if begin + block * BLOCK_N >= end:
        return
    first, count = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
    at, j = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    column = begin + block * BLOCK_N + tl.arange(0, BLOCK_N)
    real, inside = at < count, column < end
    row = tl.load(rows_ptr + first + at, mask=real, other=0).to(tl.int64)
    b_at = b_ptr + adapter.to(tl.int64) * (RANK * N) + j[:, None] * N + column[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, RANK, BLOCK_R):
        t = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for split in tl.static_range(SPLITS):
            t_row = (split * total + first + at).to(tl.int64) * (PARTS * RANK)
            t += tl.load(t_ptr + t_row[:, None] + part * RANK + start + j[None, :], mask=real[:, None], other=0.0)
        b = tl.load(b_at + start * N, mask=inside[None, :], other=0.0)
        acc = tl.dot(t.to(b.dtype), b, acc, input_precision="ieee")
    scale = tl.load(scales_ptr + adapter * PARTS + part)
    y_at = y_ptr + row[:, None] * y_stride + column[None, :]
    both = real[:, None] & inside[None, :]
    y = tl.load(y_at, mask=both, other=0.0).to(tl.float32) + acc * scale
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=both)


def lora(y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> None:
    """y[T, N] += what each row's adapter makes of x[T, K], in place."""
    total, (_, outputs, k), n = x.shape[0], weights.a.shape, weights.b.shape[2]
    shaped("x", x, total, k)
    shaped("y", y, total, n)
    for name, tensor in (("y", y), ("the adapters' a", weights.a), ("the adapters' b", weights.b)):
        row_stride(name, tensor, x)
    for name, tensor in (("rows", rows.rows), ("tiles", rows.tiles)):
        index(name, tensor, x, torch.int32)
    on_device("the adapters' scales", weights.scales, x)
    if rows.tile_rows < 16 or rows.tile_rows & (rows.tile_rows - 1):
        raise ConfigError(f"tiles of LoRA rows must hold a power of two from 16 on, not {rows.tile_rows}")
    tiles, parts, rank, tile_rows = rows.tiles.shape[0], weights.parts, weights.rank, rows.tile_rows
    if not tiles:
        return
    splits = min(MOST_SPLITS, triton.cdiv(k, SPLIT_INPUTS)) if tile_rows <= FEW_ROWS else 1
    t = torch.empty((splits, total, outputs), dtype=torch.float32, device=x.device)
    sizes = {"PARTS": parts, "RANK": rank, "SPLITS": splits, "BLOCK_M": tile_rows}
    shrink = {"BLOCK_K": _inputs_at_once(rank), "num_warps": 4 if rank <= 128 else 8}
    shrink["num_stages"] = 3 if tile_rows <= FEW_ROWS and rank <= 256 else 2
    lora_shrink_kernel[(tiles, parts, splits)](
        x, rows.rows, rows.tiles, weights.a, weights.ranks, t, total, row_stride("x", x),
        K=k, **sizes, **shrink,
    )  # fmt: skip
    widest = max(end - begin for begin, end in zip(weights.columns, weights.columns[1:], strict=False))
    aligned = all(column % 16 == 0 for column in weights.columns)
    block_n = 128 if tile_rows <= FEW_ROWS else 64
    lora_expand_kernel[(tiles, triton.cdiv(widest, block_n), parts)](
        t, rows.rows, rows.tiles, weights.b, weights.scales, weights.ranks, weights.bounds, y, total, row_stride("y", y),
        N=n, ALIGNED=aligned, BLOCK_N=block_n, BLOCK_R=min(rank, 32), num_warps=4, num_stages=2, **sizes,
    )  # fmt: skip


def _inputs_at_once(rank: int) -> int:
    """Of a turn of the loop over K: what keeps 8 to 16 KB of a under way, and lets the tiles of the largest ranks fit 64 KB."""
    return 256 if rank <= 32 else 128 if rank <= 64 else 64 if rank <= 256 else 32
