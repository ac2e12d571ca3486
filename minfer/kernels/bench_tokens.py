"""What a decode step does behind its last layer, as `minfer.kernels.bench` times it: tokens out of logits [rows, vocabulary]."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from minfer.kernels.bench_shapes import Call, Case, Sizes
from minfer.kernels.ops import Ops


def token_cases(sizes: Sizes, rows: int) -> Iterator[Case]:
    if rows > sizes.decode:
        return
    yield Case("argmax", "argmax", rows * sizes.shape.vocab * 4, 0, "float32", *_argmax(sizes, rows))


def _argmax(sizes: Sizes, rows: int) -> tuple[Callable[[Ops], Call], Callable[[], Call]]:
    def logits() -> torch.Tensor:
        return torch.randn(rows, sizes.shape.vocab, device=sizes.device)

    def make(ops: Ops) -> Call:
        x = logits()
        return lambda: ops.argmax(x)

    def library() -> Call:
        x = logits()
        return lambda: x.argmax(-1)

    return make, library
