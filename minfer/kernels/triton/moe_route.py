"""Who goes where in a mixture of experts: the top of each token's router, and the list of (token, expert) pairs sorted by expert.

A pair is token * top_k + place. The grouped products want the rows of one expert side by side, in blocks of BLOCK_M that belong to one
expert each; where they end up in memory is nobody's business but theirs, so nothing is moved: a block lists its pairs.

    route     grid (T)   a row of E logits in registers: softmax, and top_k times the highest that is left
    count     grid (E)   a program counts the pairs of its expert
    place     grid (E)   it adds up the blocks of the experts before its own, and writes its pairs there, in their order

    9 pairs, 4 experts, BLOCK_M = 4; expert 0 has the pairs 1 4 6, expert 1 none, expert 2 0 2 3 5 7, expert 3 8

    blocks           [ 1 4 6 - ][ 0 2 3 5 ][ 7 - - - ][ 8 - - - ][ unused ][ unused ]
    their expert          0          2          2          3         -1        -1

Nothing waits for the host, and no grid depends on the routing: there are as many blocks as the worst routing needs, T top_k / BLOCK_M +
min(E, T top_k), and unused ones are marked, so that a step can stand in a CUDA graph. Sums of integers only and no atomics: the same
logits give the same lists.

What moves is small: E logits a token, and each of E programs reads all T top_k pairs twice, from L2: 4 bytes x 2 E T top_k, 64 MiB for
a prompt of 8192 tokens, 8 of 128 experts, where a layer's products take milliseconds. One program for all would take longer than that.

With few pairs (`UNSORTED_PAIRS`) sorting costs more launches than it saves: each pair is a block of its own, and a matrix that two tokens
share comes from L2 the second time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.triton.checks import power_of_2, row_stride

UNSORTED_PAIRS = 16
_BLOCK = 1024


@triton.jit
def route_kernel(
    logits_ptr, experts_ptr, shares_ptr, stride, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    row, at, place = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK), tl.arange(0, PLACES)
    logits = tl.load(logits_ptr + row * stride + at, mask=at < EXPERTS, other=float("-inf")).to(tl.float32)
    total = tl.sum(tl.exp(logits - tl.max(logits, axis=0)), axis=0)
    ranked = tl.where(logits == logits, logits, float("-inf"))  # what isn't a number is chosen last, but never twice
    left = at < EXPERTS
    chosen, values = tl.zeros([PLACES], tl.int32), tl.zeros([PLACES], tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(tl.where(left, ranked, float("-inf")), axis=0)
        expert = tl.min(tl.where(left & (ranked == best), at, BLOCK), axis=0)  # of equals the lower number
        chosen, values = tl.where(place == k, expert, chosen), tl.where(place == k, best, values)
        left = left & (at != expert)
    shares = tl.where(place < TOP_K, tl.exp(values - tl.max(logits, axis=0)) / total, 0.0)
    if RENORMALIZE:
        shares /= tl.sum(shares, axis=0)
    tl.store(experts_ptr + row * TOP_K + place, chosen, mask=place < TOP_K)
    tl.store(shares_ptr + row * TOP_K + place, shares, mask=place < TOP_K)


@triton.jit
def count_kernel(experts_ptr, counts_ptr, pairs, BLOCK: tl.constexpr):
    expert, at = tl.program_id(0), tl.arange(0, BLOCK)
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(0, pairs, BLOCK):
        found += (tl.load(experts_ptr + start + at, mask=start + at < pairs, other=-1) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, axis=0))


@triton.jit
def place_kernel(
    experts_ptr, counts_ptr, block_experts_ptr, block_pairs_ptr, pairs, blocks,
    EXPERTS: tl.constexpr, EXPERTS_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    expert, at, other = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, EXPERTS_TILE)
    taken = (tl.load(counts_ptr + other, mask=other < EXPERTS, other=0) + BLOCK_M - 1) // BLOCK_M  # blocks of each expert
    first, own = tl.sum(tl.where(other < expert, taken, 0), axis=0), tl.sum(tl.where(other == expert, taken, 0), axis=0)
    for block in range(0, own, BLOCK):
        tl.store(block_experts_ptr + first + block + at, tl.zeros([BLOCK], tl.int32) + expert, mask=block + at < own)
    if expert == EXPERTS - 1:
        for block in range(first + own, blocks, BLOCK):
            tl.store(block_experts_ptr + block + at, tl.full([BLOCK], -1, tl.int32), mask=block + at < blocks)
    written = 0
    for start in range(0, pairs, BLOCK):
        mine = (tl.load(experts_ptr + start + at, mask=start + at < pairs, other=-1) == expert).to(tl.int32)
        place = first * BLOCK_M + written + tl.cumsum(mine, axis=0) - 1
        tl.store(block_pairs_ptr + place, start + at, mask=mine == 1)
        written += tl.sum(mine, axis=0)
    tail = written + tl.arange(0, BLOCK_M)
    tl.store(block_pairs_ptr + first * BLOCK_M + tail, tl.zeros([BLOCK_M], tl.int32) + pairs, mask=tail < own * BLOCK_M)


@triton.jit
def block_of(block_experts_ptr, block_pairs_ptr, pairs, SORTED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of the program's block, -1 for an unused one, and its pairs [BLOCK_M]: `pairs` where there is none."""
    block, row = tl.program_id(0), tl.arange(0, BLOCK_M)
    expert = tl.load(block_experts_ptr + block)
    if SORTED:
        pair = tl.load(block_pairs_ptr + block.to(tl.int64) * BLOCK_M + row, mask=(row >= 0) & (expert >= 0), other=0)
    else:
        pair = tl.where(row == 0, block, pairs)
    return expert, pair


@dataclass(frozen=True)
class Blocks:
    """count: how many blocks there may be. experts int32 [count]; pairs int32 [count * rows], None where block b is pair b."""

    count: int
    rows: int
    experts: torch.Tensor
    pairs: torch.Tensor | None


def route(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """logits[T, E] -> the chosen experts, the highest first, int32 [T, top_k], and their shares float32."""
    (tokens, count), stride = logits.shape, row_stride("router_logits", logits)
    if not 1 <= top_k <= count:
        raise ConfigError(f"a token can go to 1 to {count} of {count} experts, not to {top_k}")
    experts = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    shares = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    tiles = {"BLOCK": power_of_2(count), "PLACES": power_of_2(top_k)}
    route_kernel[(tokens,)](logits, experts, shares, stride, EXPERTS=count, TOP_K=top_k, RENORMALIZE=renormalize, **tiles, num_warps=1)
    return experts, shares


def sort_by_expert(experts: torch.Tensor, count: int, block_rows: int) -> Blocks:
    """experts[T, top_k] of `count` -> the pairs in blocks of `block_rows`, each of one expert."""
    pairs = experts.numel()
    if pairs <= UNSORTED_PAIRS:
        return Blocks(pairs, block_rows, experts, None)
    blocks = pairs // block_rows + min(count, pairs)
    counts, block_experts, block_pairs = (
        torch.empty(size, dtype=torch.int32, device=experts.device) for size in (count, blocks, blocks * block_rows)
    )
    block = min(_BLOCK, power_of_2(pairs))
    count_kernel[(count,)](experts, counts, pairs, BLOCK=block, num_warps=4)
    sizes = {"EXPERTS": count, "EXPERTS_TILE": power_of_2(count), "BLOCK_M": block_rows, "BLOCK": block, "num_warps": 4}
    place_kernel[(count,)](experts, counts, block_experts, block_pairs, pairs, blocks, **sizes)
    return Blocks(blocks, block_rows, block_experts, block_pairs)
