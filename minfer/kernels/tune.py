"""Finds the block shapes of the Triton products and writes them to their table: `python -m minfer.kernels.tune`, on a GPU.

For every kind of matrix and class of rows, every candidate multiplies by the matrices of one model (llama3.1-8b's four, unless --shape
says otherwise), and the one that takes the least time for all of them together becomes the entry of this device's architecture in
`minfer/kernels/triton/tuning.json`. Grouped products run as the whole mixture of one layer (qwen3-30b-a3b's, unless --mixture says
otherwise); their class is the rows of a block, which many sizes of steps share. Other architectures' entries stay. That takes minutes
and is done once, by a developer: serving reads the table and times nothing.

Candidates that a device has no room for (registers, shared memory) fail to launch and are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from minfer.errors import ConfigError
from minfer.kernels.bench_devices import GpuMachine, Machine
from minfer.kernels.bench_moe import MOE_KINDS, experts_of, routing
from minfer.kernels.bench_shapes import KINDS, SHAPES, Mixture, Sizes, matrices_of, matrix
from minfer.kernels.ops import Ops

if TYPE_CHECKING:
    from minfer.kernels.triton.linear_codes import TritonCodesWeight
    from minfer.kernels.triton.linear_w8a8 import TritonRoundedWeight
    from minfer.kernels.triton.moe import TritonExperts

    Tuned = TritonCodesWeight | TritonRoundedWeight

Blocks = dict[str, int]
Entries = dict[str, Any]  # by name, as `tuning.json` has them
Calls = Mapping[str, Sequence[Callable[[], Any]]]
Judge = Callable[[Iterable[float]], float]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 8, 64, 256, 512, 1024, 4096)
ROUTINGS = 8  # of a step with experts, so that not the same ones come from a cache each time


def candidates(default: Mapping[str, int]) -> Iterator[Blocks]:
    """Shapes worth trying, for a kernel with these constants; the default first."""
    yield dict(default)
    ranges: dict[str, Sequence[int]]
    if "COLUMNS" in default:
        ranges = {"COLUMNS": (4, 8, 16), "TILE": (1, 2, 4, 8), "num_warps": (2, 4, 8)}
    elif "TILE" in default:
        ranges = {"BLOCK_N": (16, 32, 64), "TILE": (2, 4, 8, 16), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
    else:
        ranges = {"BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
        ranges |= {"BLOCK_K": (64, 128, 256)} if "BLOCK_K" in default else {}
        if "BLOCK_M" in default:  # else the rows of a block are given, as in grouped products
            rows = default["BLOCK_M"]
            ranges["BLOCK_M"] = sorted({rows, max(16, rows // 2), min(128, rows * 2)})
    for values in itertools.product(*ranges.values()):
        candidate = {**default, **dict(zip(ranges, values, strict=True))}
        if candidate != dict(default):
            yield candidate


def fastest(
    name: str, default: Mapping[str, int], use: Callable[[Blocks], None], calls: Calls, judge: Judge, machine: Machine, seconds: float
) -> dict[str, Any]:
    """The entry of this name. `use` lets the calls run with a candidate; `judge` makes one number of their times.

    Raises ConfigError if nothing could be launched.
    """
    from triton.runtime.errors import OutOfResources

    best: tuple[float, Blocks] | None = None
    for candidate in candidates(default):
        use(candidate)
        try:
            taken = judge(statistics.median(times) for times in machine.time(calls, seconds).values())
        except OutOfResources:
            continue
        if best is None or taken < best[0]:
            best = taken, candidate
    if best is None:
        raise ConfigError(f"none of the block shapes for {name} could be launched on this device")
    return {**best[1], "source": f"measured on {machine.describe()['device']}"}


def best_blocks(weights: Sequence[Tuned], rows: int, machine: Machine, seconds: float) -> Entries:
    """Of the products of one layer, all of which are to take the least time together."""
    from minfer.kernels.triton.tuning import Tuning

    inputs = [torch.randn(rows, weight.shape[1], device=machine.device).to(weight.dtype) for weight in weights]
    name, default = weights[0].class_of(rows), weights[0].default_blocks(rows)

    def use(candidate: Blocks) -> None:
        for weight in weights:
            weight.tuning = Tuning({name: candidate})

    calls = {str(n): [partial(weight.linear, x, None)] for n, (weight, x) in enumerate(zip(weights, inputs, strict=True))}
    return {name: fastest(name, default, use, calls, sum, machine, seconds)}


def best_grouped(experts: TritonExperts, mixture: Mixture, tokens: Sequence[int], machine: Machine, seconds: float) -> Entries:
    """Of a mixture's products in steps of so many tokens, whose blocks all have the same number of rows.

    Steps are worth the same however long they take: what is least is the product of their times.
    """
    from minfer.kernels.triton.moe import block_rows
    from minfer.kernels.triton.tuning import Tuning

    def calls_of(rows: int) -> list[Callable[[], Any]]:
        """Each with other experts."""
        x, logits = torch.randn(rows, experts.gate_up[0].shape[1], device=machine.device).to(experts.down.dtype), routing(mixture, rows)
        renamed = [logits[:, torch.randperm(mixture.experts)].to(machine.device, x.dtype) for _ in range(ROUTINGS)]
        return [partial(experts.moe, x, own, mixture.top_k, True, "silu", None) for own in renamed]

    calls = {str(rows): calls_of(rows) for rows in tokens}
    rows, found = block_rows(tokens[0] * mixture.top_k, mixture.experts), Entries()
    for grouped in (*experts.gate_up, experts.down):
        name = grouped.class_of(rows)
        if name in found:
            continue  # of one kind with another, whose entry it shares

        def use(candidate: Blocks, name: str = name) -> None:
            experts.tuning = Tuning({**found, name: candidate})

        found[name] = fastest(name, grouped.default_blocks(rows), use, calls, math.prod, machine, seconds)
    return found


def tune_linear(machine: Machine, dtype: torch.dtype, shape: str, kinds: Sequence[str], rows: Sequence[int], seconds: float) -> Entries:
    """Entries by name, for this device. Says each one as it is found."""
    from minfer.kernels.triton import TritonBackend
    from minfer.kernels.triton.linear_codes import TritonCodesWeight
    from minfer.kernels.triton.linear_w8a8 import TritonRoundedWeight

    sizes = Sizes(SHAPES[shape], dtype, machine.device, (), machine.decode_rows, machine.rounds_inputs)
    backend = TritonBackend(machine.device, dtype)
    entries = Entries()
    for kind in kinds:
        prepared = [backend.prepare(matrix(kind, n, k, sizes), dtype) for n, k in matrices_of(sizes.shape).values()]
        weights = [weight for weight in prepared if isinstance(weight, TritonCodesWeight | TritonRoundedWeight)]
        for count in rows if weights else ():
            entries |= _said(best_blocks(weights, count, machine, seconds))
    return entries


def tune_moe(machine: Machine, dtype: torch.dtype, shape: str, kinds: Sequence[str], tokens: Sequence[int], seconds: float) -> Entries:
    """The same of a mixture's experts. `tokens` of steps: those whose blocks have the same number of rows share an entry."""
    from minfer.kernels.triton import TritonBackend
    from minfer.kernels.triton.moe import TritonExperts, block_rows

    sizes = Sizes(SHAPES[shape], dtype, machine.device, (), machine.decode_rows, machine.rounds_inputs)
    ops, mixture, entries = Ops([TritonBackend(machine.device, dtype)], dtype), sizes.shape.mixture, Entries()
    if mixture is None:
        raise ConfigError(f"{shape} has no experts")
    for kind in kinds:
        experts = experts_of(ops, sizes, mixture, kind)
        if not isinstance(experts, TritonExperts):
            continue
        for _, steps in itertools.groupby(sorted(tokens), lambda count: block_rows(count * mixture.top_k, mixture.experts)):
            entries |= _said(best_grouped(experts, mixture, list(steps), machine, seconds))
    return entries


def _said(entries: Entries) -> Entries:
    for name, entry in entries.items():
        print(f"{name}: {entry}", flush=True)
    return entries


def write(architecture: str, entries: Mapping[str, Any]) -> None:
    """Into the committed table; entries of other names and architectures stay."""
    from minfer.kernels.triton.tuning import TABLE

    table = json.loads(TABLE.read_text())
    table[architecture] = {**table.get(architecture, {}), **entries}
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minfer.kernels.tune", description="Finds the block shapes of the Triton products.")
    parser.add_argument("--op", choices=("linear", "moe"), nargs="+", default=("linear", "moe"), help="which products (default: both)")
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b", help="model whose matrices are multiplied by")
    mixtures = [name for name, shape in SHAPES.items() if shape.mixture]
    parser.add_argument("--mixture", choices=mixtures, default="qwen3-30b-a3b", help="model whose experts are multiplied by")
    parser.add_argument("--kind", choices=KINDS, nargs="+", help="which matrices (default: all that have a table)")
    parser.add_argument(
        "--rows", type=int, nargs="+", help="rows of x, or tokens of a step with experts; a class ends at each power of two"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--each", type=float, default=0.02, help="seconds for each candidate")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("error: tuning times kernels, so it needs a CUDA or ROCm device, and torch sees none; the committed table stays as it is")
    from minfer.kernels.triton.targets import Target

    machine, dtype, entries = GpuMachine(), getattr(torch, options.dtype), Entries()
    if "linear" in options.op:
        kinds = [name for name in options.kind or KINDS if KINDS[name].element]
        entries |= tune_linear(machine, dtype, options.shape, kinds, options.rows or ROWS, options.each)
    if "moe" in options.op:
        entries |= tune_moe(machine, dtype, options.mixture, options.kind or MOE_KINDS, options.rows or TOKENS, options.each)
    if not entries:
        sys.exit(
            "error: nothing was tuned: dense products outside of experts are the vendor's library's, or this device has no such kernels"
        )
    write(Target.of(machine.device).architecture, entries)


if __name__ == "__main__":
    main()
