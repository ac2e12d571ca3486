"""What a draw is, in float64 numpy that sorts everything: the oracle of every backend's `sample`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from minfer.sampling.rng import key_words, uniforms

Row = NDArray[np.float64]
Wish = tuple[float, float, float, float, float]  # u, temperature, top-k, top-p, min-p
SLACK = 1e-5  # of the mass: within it of a boundary, float32 weights may choose the neighbour
LARGEST = float(np.nextafter(1.0, 0.0))
EXTREMES = (7, 14971210489), (7, 8657089182)  # the nearest to 0 and to 1 of seed 7's first 2^34 numbers


@functools.cache
def _pool() -> tuple[Row, list[tuple[int, int]]]:
    """Numbers, a few in each 10,000th of [0, 1), and the seed and position of each."""
    random = np.random.default_rng(0)
    seeds, positions = random.integers(2**64, size=2**17, dtype=np.uint64), random.integers(1, 2**20, 2**17)
    pairs = [*EXTREMES, *zip(seeds.tolist(), positions.tolist(), strict=True)]
    numbers = uniforms(*zip(*pairs, strict=True))
    assert numbers[0] < 2**-34
    assert numbers[1] > 1 - 2**-32
    return numbers, pairs


def rows_of(wishes: Sequence[Wish], device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, list[Wish]]:
    """Wishes and positions as `Ops.sample` takes them, whose numbers are nearly those asked for; and the wishes with these numbers."""
    numbers, pairs = _pool()
    at = [int(np.abs(numbers - u).argmin()) for u, *_ in wishes]
    asked = [(*key_words(pairs[i][0]), *wish[1:]) for i, wish in zip(at, wishes, strict=True)]
    newest = torch.tensor([pairs[i][1] - 1 for i in at], device=device)
    exact = [(float(numbers[i]), *wish[1:]) for i, wish in zip(at, wishes, strict=True)]
    return torch.tensor(asked, dtype=torch.float64, device=device), newest, exact


def draw(logits: Row, uniform: float, temperature: float, top_k: int, top_p: float, min_p: float) -> int:
    """One token by the definition: filters in the order top-k, top-p, min-p over ranks; without any, in id order."""
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.arange(len(logits))
    if top_k or top_p < 1 or min_p:
        order = np.lexsort((order, -logits))[: top_k or None]
        total = weights[order].sum() if top_k else weights.sum()
        weights = weights[order]
        before = np.cumsum(weights) - weights
        kept = ((before < top_p * total) | (top_p >= 1)) & (weights >= min_p)
        order, weights = order[kept], weights[kept]
    return int(order[np.searchsorted(np.cumsum(weights), uniform * weights.sum(), side="right").clip(max=len(order) - 1)])


def logits_of(rows: int, width: int, spread: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width + 3, generator=generator) * spread)[:, :width]


def allowed(row: Row, wish: tuple[float, ...]) -> set[int]:
    """The tokens that a wish (u, temperature, top-k, top-p, min-p) may give, with sums rounded one way or the other."""
    u, t, k, p, m = wish
    shifts = itertools.product((-SLACK, 0, SLACK), (-SLACK, 0, SLACK))
    return {draw(row, min(max(u + du, 0), 1), t, int(k) if k < len(row) else 0, p + dp if p < 1 else 1, m) for du, dp in shifts}
