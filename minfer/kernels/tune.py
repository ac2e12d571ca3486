"""Finds the block shapes of the Triton products and writes them to their table: `python -m minfer.kernels.tune`, on a GPU.

For every kind of matrix and class of rows, every candidate multiplies by the matrices of one model (llama3.1-8b's four, unless --shape
says otherwise), and the one that takes the least time for all of them together becomes the entry of this device's architecture in
`minfer/kernels/triton/tuning.json`. Other architectures' entries stay. That takes minutes and is done once, by a developer: serving reads
the table and times nothing.

Candidates that a device has no room for (registers, shared memory) fail to launch and are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from minfer.errors import ConfigError
from minfer.kernels.bench_devices import GpuMachine, Machine
from minfer.kernels.bench_shapes import KINDS, SHAPES, Sizes, matrices_of, matrix

if TYPE_CHECKING:
    from minfer.kernels.triton.linear_codes import TritonCodesWeight
    from minfer.kernels.triton.linear_w8a8 import TritonRoundedWeight

    Tuned = TritonCodesWeight | TritonRoundedWeight

Blocks = dict[str, int]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def candidates(default: Mapping[str, int]) -> Iterator[Blocks]:
    """Shapes worth trying, for a kernel with these constants; the default first."""
    yield dict(default)
    ranges: dict[str, Sequence[int]]
    if "COLUMNS" in default:
        ranges = {"COLUMNS": (4, 8, 16), "TILE": (1, 2, 4, 8), "num_warps": (2, 4, 8)}
    elif "TILE" in default:
        ranges = {"BLOCK_N": (16, 32, 64), "TILE": (2, 4, 8, 16), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5)}
    else:
        rows = default["BLOCK_M"]
        ranges = {"BLOCK_M": sorted({rows, max(16, rows // 2), min(128, rows * 2)}), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8)}
        ranges |= {"num_stages": (2, 3, 4, 5)} | ({"BLOCK_K": (64, 128, 256)} if "BLOCK_K" in default else {})
    for values in itertools.product(*ranges.values()):
        candidate = {**default, **dict(zip(ranges, values, strict=True))}
        if candidate != dict(default):
            yield candidate


def best_blocks(weights: Sequence[Tuned], rows: int, machine: Machine, seconds: float) -> tuple[str, dict[str, Any]]:
    """The entry's name, and the entry. Raises ConfigError if nothing could be launched."""
    from triton.runtime.errors import OutOfResources

    from minfer.kernels.triton.tuning import Tuning

    inputs = [torch.randn(rows, weight.shape[1], device=machine.device).to(weight.dtype) for weight in weights]
    name, default = weights[0].class_of(rows), weights[0].default_blocks(rows)
    best: tuple[float, Blocks] | None = None
    for candidate in candidates(default):
        for weight in weights:
            weight.tuning = Tuning({name: candidate})
        calls = {str(n): [partial(weight.linear, x, None)] for n, (weight, x) in enumerate(zip(weights, inputs, strict=True))}
        try:
            taken = sum(statistics.median(times) for times in machine.time(calls, seconds).values())
        except OutOfResources:
            continue
        if best is None or taken < best[0]:
            best = taken, candidate
    if best is None:
        raise ConfigError(f"none of the block shapes for {name} could be launched on this device")
    return name, {**best[1], "source": f"measured on {machine.describe()['device']}"}


def tune(machine: Machine, dtype: torch.dtype, shape: str, kinds: Sequence[str], rows: Sequence[int], seconds: float) -> dict[str, Any]:
    """Entries by name, for this device. Says each one as it is found."""
    from minfer.kernels.triton import TritonBackend
    from minfer.kernels.triton.linear_codes import TritonCodesWeight
    from minfer.kernels.triton.linear_w8a8 import TritonRoundedWeight

    sizes = Sizes(SHAPES[shape], dtype, machine.device, (), machine.decode_rows, machine.rounds_inputs)
    backend = TritonBackend(machine.device, dtype)
    entries: dict[str, Any] = {}
    for kind in kinds:
        prepared = [backend.prepare(matrix(kind, n, k, sizes), dtype) for n, k in matrices_of(sizes.shape).values()]
        weights = [weight for weight in prepared if isinstance(weight, TritonCodesWeight | TritonRoundedWeight)]
        for count in rows if weights else ():
            name, entry = best_blocks(weights, count, machine, seconds)
            entries[name] = entry
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
    parser.add_argument("--shape", choices=SHAPES, default="llama3.1-8b", help="model whose matrices are multiplied by")
    parser.add_argument(
        "--kind", choices=[name for name, kind in KINDS.items() if kind.element], nargs="+", help="which matrices (default: all)"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="rows of x; a class ends at each power of two")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--each", type=float, default=0.02, help="seconds for each candidate")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("error: tuning times kernels, so it needs a CUDA or ROCm device, and torch sees none; the committed table stays as it is")
    from minfer.kernels.triton.targets import Target

    machine = GpuMachine()
    kinds = options.kind or [name for name, kind in KINDS.items() if kind.element]
    entries = tune(machine, getattr(torch, options.dtype), options.shape, kinds, options.rows, options.each)
    write(Target.of(machine.device).architecture, entries)


if __name__ == "__main__":
    main()
