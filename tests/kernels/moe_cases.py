"""Mixtures of experts for the kernels' tests: routings that are awkward, and what comes out of them in float64, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minfer.kernels.ops import Experts, Ops
from minfer.quant import PackedWeight

Matrix = torch.Tensor | PackedWeight


def routing(kind: str, tokens: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Router logits [T, E] float32. one: all tokens like expert E - 1 best; idle: nobody likes expert 0, one token expert 1 best."""
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
    if kind == "one":
        logits[:, -1] += 20
    if kind == "idle":
        logits[:, :2] -= 20
        logits[0, 1] += 60
    if kind == "ties":
        logits = (logits * 0.7).round()
    return logits


def expected(
    x: torch.Tensor,
    logits: torch.Tensor,
    gate_up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    top_k: int,
    renormalize: bool,
    shared: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The definition, in float64."""
    rows = []
    for n, (row, scores) in enumerate(zip(x.double(), logits.double(), strict=True)):
        shares = torch.exp(scores) / torch.exp(scores).sum()
        chosen = sorted(range(len(scores)), key=lambda e, s=scores: (-float(s[e]), e))[:top_k]
        total = sum(float(shares[e]) for e in chosen) if renormalize else 1.0
        out = torch.zeros(down[0].shape[0], dtype=torch.float64)
        for e in chosen:
            gate, up = (gate_up[e].double() @ row).chunk(2)
            out += float(shares[e]) / total * (down[e].double() @ (gate / (1 + torch.exp(-gate)) * up))
        if shared is not None:
            y, gate = shared
            out += y[n].double() / (1 + torch.exp(-gate[n].double()))
        rows.append(out)
    return torch.stack(rows) if rows else torch.zeros(x.shape, dtype=torch.float64)


def joined(ops: Ops, gate_up: Sequence[Matrix], down: Sequence[Matrix]) -> Experts:
    return ops.prepare_experts([ops.prepare(matrix) for matrix in gate_up], [ops.prepare(matrix) for matrix in down])


def numbers(matrices: Sequence[Matrix]) -> list[torch.Tensor]:
    return [matrix.dequantize(torch.float64) if isinstance(matrix, PackedWeight) else matrix.cpu() for matrix in matrices]
