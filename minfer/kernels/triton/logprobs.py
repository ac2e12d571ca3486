"""Log-probabilities of raw logits: of one token of each row, its rank, and the k most likely tokens. Two launches, as in `sample.py`:

    score_kernel    grid (R, V / 4096)   the maximum of every 64 logits, the sum of exp(x - maximum), and how many rank before the token
    listing_kernel  grid (R)             the total; candidates from the k-th largest maximum up (`ranks.py`), a few more than k; k times the
                                         best of them behind the last one taken, as one integer:  | logit's key | id, falling |

Bytes: 4 R V read, once. What it spares is the wait: the answer travels to the host beside the token, where torch's own operations on the
kept logits would be launched only after the token had been waited for, and sort whole rows.

A value is (logit - (best + log of the total)) in float64, rounded once: the same float whether its token was picked or listed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.triton.checks import index, row_stride, shaped
from minfer.kernels.triton.ranks import BLOCK, block_maxima, block_sums, gather_from, key_of, kth_block, load_blocks, logit_of
from minfer.kernels.triton.sample import BLOCKS_EACH, candidates


@triton.jit
def score_kernel(x_ptr, tokens_ptr, maxima_ptr, sums_ptr, ahead_ptr, x_stride, width, blocks, COUNT: tl.constexpr):
    """maxima, sums: [R, blocks] float32; ahead: [R, blocks] int32."""
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * COUNT
    x_ptr += row * x_stride
    block = first + tl.arange(0, COUNT)
    token = tl.load(tokens_ptr + row)
    chosen = tl.load(x_ptr + token)
    at, x = load_blocks(x_ptr, first, width, COUNT)
    maxima = block_maxima(x)
    before = (at < width) & ((x > chosen) | ((x == chosen) & (at < token)))
    tl.store(maxima_ptr + row * blocks + block, maxima, mask=block < blocks)
    tl.store(sums_ptr + row * blocks + block, block_sums(x, maxima, 1.0), mask=block < blocks)
    tl.store(ahead_ptr + row * blocks + block, tl.sum(before.to(tl.int32), axis=1), mask=block < blocks)


@triton.jit
def listing_kernel(
    x_ptr, tokens_ptr, maxima_ptr, sums_ptr, ahead_ptr, found_ptr, top_ptr, blocks_ptr, values_ptr, ids_ptr, x_stride, width, blocks, k,
    BLOCKS: tl.constexpr, ROOM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """found: [R, 1 + k] float32. top: [R, 1 + k] int64, how many rank before the token and then the ids of the best."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    blocks_ptr += row * BLOCKS
    values_ptr += row * ROOM
    ids_ptr += row * ROOM
    found_ptr += row * (k + 1)
    top_ptr += row * (k + 1)
    block = tl.arange(0, BLOCKS)
    at = row * blocks + block
    maxima = tl.load(maxima_ptr + at, mask=block < blocks, other=float("-inf"))
    best = tl.max(maxima, axis=0)
    mass = tl.load(sums_ptr + at, mask=block < blocks, other=0.0) * tl.exp(maxima - best)
    norm = best.to(tl.float64) + tl.log(tl.sum(mass.to(tl.float64), axis=0))
    chosen = tl.load(x_ptr + tl.load(tokens_ptr + row))
    tl.store(found_ptr, (chosen.to(tl.float64) - norm).to(tl.float32))
    tl.store(top_ptr, tl.sum(tl.load(ahead_ptr + at, mask=block < blocks, other=0), axis=0).to(tl.int64))
    if k > 0:
        count = gather_from(x_ptr, maxima, blocks_ptr, values_ptr, ids_ptr, width, kth_block(maxima, best, k), ROOM, TILE)
        whole = (count > ROOM) | (count < k)  # fewer than k: -inf is among the best
        if whole:
            values_ptr, count = x_ptr, tl.full((), width, tl.int32)
        last = tl.full((), 2**63 - 1, tl.int64)
        for place in range(1, k + 1):
            last = _next(values_ptr, ids_ptr, whole, count, last, TILE)
            tl.store(top_ptr + place, 0x7FFFFFFF - (last & 0x7FFFFFFF))
            tl.store(found_ptr + place, (logit_of(last >> 32).to(tl.float64) - norm).to(tl.float32))


@triton.jit
def _next(values_ptr, ids_ptr, whole, count, last, TILE: tl.constexpr):
    """The candidate behind `last` in rank: its key, and below it an id that falls as ids rise."""
    lanes = tl.full([TILE], -(2**63), tl.int64)
    for start in range(0, count, TILE):
        at = start + tl.arange(0, TILE)
        x = tl.load(values_ptr + at, mask=at < count, other=float("-inf"))
        ids = tl.where(whole, at, tl.load(ids_ptr + at, mask=(at < count) & (whole == 0), other=0))
        place = (key_of(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
        lanes = tl.maximum(lanes, tl.where((at < count) & (place < last), place, -(2**63)))
    return tl.max(lanes, axis=0)


def logprobs(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`Ops.logprobs`: logits[R, V] float32, tokens[R] int64, 0 <= k <= V -> ([R, 1 + k] float32, [R, 1 + k] int64)."""
    stride, (rows, width) = row_stride("logits", logits), logits.shape
    index("tokens", tokens, logits, torch.int64)
    shaped("tokens", tokens, rows)
    if logits.dtype != torch.float32 or not 0 <= k <= width:
        raise ConfigError(f"logprobs takes float32 logits and k of 0 to {width}, not {logits.dtype} and {k}")
    found = torch.empty((rows, 1 + k), dtype=torch.float32, device=logits.device)
    top = torch.empty((rows, 1 + k), dtype=torch.int64, device=logits.device)
    if rows:
        blocks = triton.cdiv(width, BLOCK)
        maxima, sums = torch.empty((2, rows, blocks), dtype=torch.float32, device=logits.device)
        ahead = torch.empty((rows, blocks), dtype=torch.int32, device=logits.device)
        scratch, sizes = candidates(rows, blocks, logits.device)
        shape, grid = (stride, width, blocks), (rows, triton.cdiv(blocks, BLOCKS_EACH))
        score_kernel[grid](logits, tokens, maxima, sums, ahead, *shape, COUNT=BLOCKS_EACH, num_warps=4)
        listing_kernel[(rows,)](logits, tokens, maxima, sums, ahead, found, top, *scratch, *shape, k, **sizes, num_warps=8)
    return found, top
