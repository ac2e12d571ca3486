"""A mixture of experts: one layer's, from the router's logits on, and how much work is in each of its launches.

Which experts a step touches, the bench's random routing says (`bench_moe.py`), so that a measurement can be held against the same work:
blocks that it fills multiply; the others of the grid end at their first load, which costs nothing here. An expert's second block finds
its matrix in L2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from minfer.kernels.bench_moe import routing, touched_by
from minfer.kernels.bench_shapes import SHAPES, feed_forward_of
from minfer.kernels.ops import Ops
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.aot import Launch
from minfer.kernels.triton.aot_cases import DTYPE, meta
from minfer.kernels.triton.cost.family import Case, Family
from minfer.kernels.triton.cost.linear import FILL, KINDS
from minfer.kernels.triton.cost.predict import Work

_MODEL = "qwen3-30b-a3b"
_DEVICES = ("H100 SXM", "H200 SXM", "MI300X")


@dataclass(frozen=True)
class Step:
    """rows: of each touched expert. width: bytes a weight with its part of scales."""

    tokens: int
    top_k: int
    experts: int
    rows: Sequence[int]
    width: float
    unit: str

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k


def case(model: str, kind: str, tokens: int, devices: Sequence[str] = _DEVICES) -> Case:
    shape, mixture = SHAPES[model], SHAPES[model].mixture
    if mixture is None:
        raise ValueError(f"{model} has no experts")
    make, width, unit = KINDS[kind]
    logits = routing(mixture, tokens)
    rows = logits.topk(mixture.top_k).indices.unique(return_counts=True)[1].tolist()
    step = Step(tokens, mixture.top_k, mixture.experts, rows, width, unit)

    def call(backend: TritonBackend) -> None:
        ops = Ops([backend], DTYPE)
        sides = [[ops.prepare(make(n, k))] * mixture.experts for n, k in feed_forward_of(shape).values()]
        experts = ops.prepare_experts(*sides)
        experts.moe(meta(tokens, shape.hidden), meta(tokens, mixture.experts), mixture.top_k, True, "silu", None)

    weights = sum(n * k for n, k in feed_forward_of(shape).values())
    moved = int(touched_by(logits, mixture) * weights * width) + 2 * tokens * (2 * shape.hidden + mixture.experts)
    return Case(
        f"{model}, {kind}, {tokens} token{'s' * (tokens > 1)}",
        call,
        lambda kernel, launch: _WORK[kernel](launch, step),
        moved,
        2 * step.pairs * weights,
        unit,
        devices,
    )


def _grouped(launch: Launch, step: Step, steps: int, x_bytes: int) -> Work:
    """x is in L2; rows past the last of a block repeat it, and a warp's equal addresses are one."""
    size, column_blocks = launch.constants, launch.grid[1]
    n, k = column_blocks * size["BLOCK_N"], size["K"]
    used = sum(-(-count // size["BLOCK_M"]) for count in step.rows) if size["SORTED"] else step.pairs
    turns = [(steps,)] * (used * column_blocks)
    matrix = len(step.rows) * n * k * step.width  # from memory
    x = used * size["BLOCK_M"] * k * x_bytes * column_blocks
    loaded = used * n * k * step.width + x
    repeated = x * (1 - step.pairs / (used * size["BLOCK_M"]))
    moved = int(matrix) + step.pairs * (k * x_bytes // size["DIVISOR"] + 2 * n)
    weights = size["BLOCK_N"] * -(-k // steps)
    return Work(turns, moved, matrix / loaded, 2 * step.pairs * n * k, step.unit, FILL, weights, repeated / loaded)


def _grouped_dense(launch: Launch, step: Step) -> Work:
    return _grouped(launch, step, -(-launch.constants["K"] // launch.constants["BLOCK_K"]), 2)


def _grouped_codes(launch: Launch, step: Step) -> Work:
    return _grouped(launch, step, launch.constants["CHUNKS"], 2)


def _grouped_bytes(launch: Launch, step: Step) -> Work:
    return _grouped(launch, step, -(-launch.constants["K"] // launch.constants["BLOCK_K"]), 1)


def _programs(launch: Launch) -> int:
    return int(torch.Size(launch.grid).numel())


def _route(launch: Launch, step: Step) -> Work:
    """The router's product has just written the logits."""
    return Work([()] * _programs(launch), step.tokens * (2 * step.experts + 8 * step.top_k), cold=0.0)


def _over_pairs(launch: Launch, step: Step) -> Work:
    """Counting and placing: every program goes over all pairs, of which the first brings them near."""
    return Work([(-(-step.pairs // launch.constants["BLOCK"]),)] * _programs(launch), 8 * step.pairs, cold=0.0)


def _small(launch: Launch, step: Step) -> Work:
    """A pass over what the launch before has written."""
    return Work([()] * _programs(launch), 0, cold=0.0)


_WORK: Mapping[str, Callable[[Launch, Step], Work]] = {
    "route_kernel": _route,
    "count_kernel": _over_pairs,
    "place_kernel": _over_pairs,
    "grouped_dense_kernel": _grouped_dense,
    "grouped_codes_kernel": _grouped_codes,
    "grouped_bytes_kernel": _grouped_bytes,
    "quantize_rows_kernel": _small,
    "silu_mul_kernel": _small,
    "combine_kernel": _small,
}

FAMILY = Family(
    "moe",
    "Mixtures of experts",
    [
        *(case(_MODEL, "int4", tokens) for tokens in (1, 8, 64)),
        *(case(_MODEL, "bf16", tokens) for tokens in (8, 64)),
        case(_MODEL, "fp8 x fp8", 64),
    ],
    intro=(
        "One layer's experts of qwen3-30b-a3b, 8 of 128 a token, from the router's logits to the sum; chosen at random, as "
        "`python -m minfer.kernels.bench --op moe` does. Of a step of 8 tokens 49 experts get a row, and each moves whole. Routing, "
        "sorting and the weighted sum are launches that wait for one another and move next to nothing. Whether compilers keep the loops "
        "over K is their choice: where no turn is listed they wrote every one out."
    ),
    first=[
        "`moe int4-128` at 1 and 8 tokens beside the copy bandwidth: whether launches of one program or a few (route, count, place) cost "
        "what is predicted, two to three microseconds each, which is a third of a step of one token.",
        "The grouped products with `python -m minfer.kernels.tune --op moe`: their blocks were chosen by reading code.",
    ],
)
