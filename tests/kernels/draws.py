"""What a draw is, in float64 numpy that sorts everything: the oracle of every backend's `sample`."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray

Row = NDArray[np.float64]
SLACK = 1e-5  # of the mass: within it of a boundary, float32 weights may choose the neighbour


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
