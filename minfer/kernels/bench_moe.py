"""A mixture of experts as `minfer.kernels.bench` times it: one layer's, all experts in memory, of which a step touches some.

Which ones, the router says, and here it is a random one: with one token top_k of E experts move, with 8 tokens of qwen3-30b-a3b some 50
of 128, with a prompt all of them. The draw is the same in every run; each further call renames its experts, so that it touches as many,
mostly others, and the bytes of a case are exact: matrices of touched experts, once, and what goes in and out.

There is no library to hold it against: a loop of dense products is nobody's kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from minfer.kernels.bench_shapes import KINDS, Call, Case, Mixture, Sizes, feed_forward_of, matrix, prepared
from minfer.kernels.ops import Experts, Ops, Weight

MOE_KINDS = ("dense", "int4-128", "fp8", "fp8 x fp8")


def moe_cases(sizes: Sizes, rows: int) -> Iterator[Case]:
    """None of a shape without experts."""
    shape, mixture, size = sizes.shape, sizes.shape.mixture, sizes.dtype.itemsize
    if mixture is None:
        return
    logits = routing(mixture, rows)
    touched, weights = touched_by(logits, mixture), 3 * shape.hidden * shape.inner
    pairs = rows * mixture.top_k
    scratch = size * (rows * (2 * shape.hidden + mixture.experts) + pairs * (3 * shape.inner + shape.hidden))
    for kind in MOE_KINDS:
        scheme = KINDS[kind]
        if any(k % (scheme.group or 1) for _, k in feed_forward_of(shape).values()):
            continue
        yield Case(
            "moe",
            f"moe {kind}, {touched} of {mixture.experts} experts",
            bytes=scheme.bytes(touched * weights, sizes) + size * rows * (2 * shape.hidden + mixture.experts),
            operations=2 * pairs * weights,
            unit=scheme.unit(sizes),
            make=_moe(sizes, mixture, kind, logits),
            memory=scratch,
            common=scheme.bytes(mixture.experts * weights, sizes),
        )


def routing(mixture: Mixture, rows: int) -> torch.Tensor:
    """Router logits [rows, E] float32 that choose at random. No two of a row are equal, in 16 bits either, as long as E is at most 256."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(rows, mixture.experts, generator=generator).argsort(-1) / 16


def touched_by(logits: torch.Tensor, mixture: Mixture) -> int:
    """How many experts get a row."""
    return len(logits.topk(mixture.top_k).indices.unique())


def experts_of(ops: Ops, sizes: Sizes, mixture: Mixture, kind: str) -> Experts | None:
    """A layer's, alike in their numbers but not in their place in memory. None where the table has no kernel for such matrices."""
    sides: list[list[Weight]] = []
    for n, k in feed_forward_of(sizes.shape).values():
        original, side = matrix(kind, n, k, sizes), list[Weight]()
        for _ in range(mixture.experts):
            weight = prepared(ops, original.clone() if isinstance(original, torch.Tensor) else original)
            if weight is None:
                return None
            side.append(weight)
        sides.append(side)
    return ops.prepare_experts(*sides)


def _moe(sizes: Sizes, mixture: Mixture, kind: str, logits: torch.Tensor) -> Callable[[Ops], Call | None]:
    @functools.cache
    def joined(ops: Ops) -> Experts | None:
        return experts_of(ops, sizes, mixture, kind)

    def make(ops: Ops) -> Call | None:
        experts, x = joined(ops), sizes.randn(len(logits), sizes.shape.hidden)
        renamed = logits[:, torch.randperm(mixture.experts)].to(sizes.device, sizes.dtype)
        return None if experts is None else lambda: ops.moe(x, renamed, experts, mixture.top_k, True, "silu")

    return make
