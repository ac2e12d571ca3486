"""What a decode step does behind its last layer, as `minfer.kernels.bench` times it: tokens out of logits [rows, vocabulary].

Every such op has to read the logits once, and masks write them again; nothing else counts. Backends may lack all but argmax: the sampler
then composes them from torch operations, which stand here as the library where they do the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from minfer.kernels.bench_shapes import Call, Case, Sizes
from minfer.kernels.ops import Ops

Contenders = tuple[Callable[[Ops], Call | None], Callable[[], Call] | None]

# name -> temperature, top-k (0: all), top-p, min-p
DRAWS = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "from all": (1.0, 0, 1.0, 0.0),
    "top-k 50": (1.0, 50, 1.0, 0.0),
    "top-p 0.9": (1.0, 0, 0.9, 0.0),
}
BEST = 5  # log-probabilities listed beside the token's


def token_cases(sizes: Sizes, rows: int) -> Iterator[Case]:
    """None of a step that is a prompt: only its last row gets a token."""
    if rows > sizes.decode:
        return
    count = rows * sizes.shape.vocab
    yield Case("argmax", "argmax", 4 * count, 0, "float32", *_argmax(sizes, rows))
    for name, wish in DRAWS.items():
        yield Case("sample", f"sample, {name}", 4 * count, 0, "float32", *_sample(sizes, rows, *wish))
    yield Case("likeliest", "likeliest", 4 * count, 0, "float32", *_likeliest(sizes, rows))
    yield Case("logprobs", f"logprobs, {BEST} best", 4 * count, 0, "float32", *_logprobs(sizes, rows))
    yield Case("forbid", "forbid", 8 * count + 4 * rows * _words(sizes), 0, "float32", *_forbid(sizes, rows))


def peaked(sizes: Sizes, rows: int) -> torch.Tensor:
    """Logits [rows, V] float32 of which, as of a model's, some hundred hold nine tenths of the weight at temperature 1."""
    return 5 * torch.randn(rows, sizes.shape.vocab, device=sizes.device)


def _argmax(sizes: Sizes, rows: int) -> Contenders:
    def make(ops: Ops) -> Call:
        x = peaked(sizes, rows)
        return lambda: ops.argmax(x)

    def library() -> Call:
        x = peaked(sizes, rows)
        return lambda: x.argmax(-1)

    return make, library


def _sample(sizes: Sizes, rows: int, temperature: float, top_k: int, top_p: float, min_p: float) -> Contenders:
    def make(ops: Ops) -> Call | None:
        draw, x = ops.sample, peaked(sizes, rows)
        wishes = torch.tensor([[0, 0, temperature, top_k, top_p, min_p]] * rows, dtype=torch.float64, device=sizes.device)
        positions = torch.arange(rows, dtype=torch.int32, device=sizes.device)  # of one seed: other numbers for each row
        return None if draw is None else lambda: draw(x, wishes, positions)

    def library() -> Call:
        """Of several exponential variables the one with rate p comes first with probability p: a draw without a sort or a sum."""
        x = peaked(sizes, rows)
        return lambda: (x.softmax(-1) / torch.empty_like(x).exponential_()).argmax(-1)

    if temperature == 0:
        return make, _argmax(sizes, rows)[1]
    return make, None if top_k or top_p < 1 or min_p else library


def _likeliest(sizes: Sizes, rows: int) -> Contenders:
    def make(ops: Ops) -> Call | None:
        likeliest, x = ops.likeliest, peaked(sizes, rows)
        return None if likeliest is None else lambda: likeliest(x)

    def library() -> Call:
        x = peaked(sizes, rows)
        return lambda: x.softmax(-1).max(-1)

    return make, library


def _logprobs(sizes: Sizes, rows: int) -> Contenders:
    def make(ops: Ops) -> Call | None:
        score, x = ops.logprobs, peaked(sizes, rows)
        tokens = x.argmax(-1)
        return None if score is None else lambda: score(x, tokens, BEST)

    def library() -> Call:
        """Without the token's rank."""
        x = peaked(sizes, rows)
        return lambda: x.log_softmax(-1).topk(BEST)

    return make, library


def _words(sizes: Sizes) -> int:
    """Of 32 bits each, of a mask."""
    return -(-sizes.shape.vocab // 32)


def _forbid(sizes: Sizes, rows: int) -> Contenders:
    def make(ops: Ops) -> Call | None:
        """The bits are on the device already: what the bus takes is no kernel's time."""
        forbid, x = ops.forbid, peaked(sizes, rows)
        bits = torch.randint(-(2**31), 2**31, (rows, _words(sizes)), dtype=torch.int32, device=sizes.device)
        return None if forbid is None else lambda: forbid(x, bits, None)

    def library() -> Call:
        """With a mask of a byte a token, already made of the bits."""
        x = peaked(sizes, rows)
        forbidden = torch.rand(x.shape, device=sizes.device) < 0.5
        return lambda: x.masked_fill_(forbidden, float("-inf"))

    return make, library
