"""Times all matrix products of one model's step, and nothing else: `python -m minfer.kernels.cpu.linear_bench`.

`minfer.kernels.bench` times one op a call, through Python, which at decode sizes costs as much as the op. Here every matrix of
every layer has memory of its own (so nothing is found in cache) and the whole step is one recorded list that C++ runs: what a
decode step costs at least. With one thread the clock is the thread's own processor time, so that other work on the machine
hardly disturbs it; with more it is wall time, to be believed on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import torch

from minfer.errors import ConfigError
from minfer.kernels.bench_shapes import SHAPES, Shape, matrices_of
from minfer.kernels.cpu.roofline import measure
from minfer.kernels.cpu.runtime import DTYPES, Runtime
from minfer.kernels.cpu.weights import Activation, LinearKernels
from minfer.kernels.ops import Weight
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.elements import LISTED

FLOATS = ("bfloat16", "float16", "float32")

# name: element, @ its group if that isn't 32 (or type), symmetric, activations
KINDS: dict[str, tuple[str, bool, Activation]] = {
    "q4_1": ("int4", False, "int8"),
    "q4_0": ("int4", True, "int8"),
    "q8_0": ("int8", True, "int8"),
    "q4_1-a16": ("int4", False, "none"),
    "q8_0-a16": ("int8", True, "none"),
    "q6_k": ("int8@16", True, "int8"),
    "q2_k": ("int4@16", False, "int8"),
    "nf4": ("nf4@64", True, "int8"),
    "iq4_nl": ("table4", True, "int8"),
    "mxfp4": ("fp4_e2m1", True, "int8"),
    "nvfp4": ("fp4_e2m1@16", True, "int8"),
    "mxfp6": ("fp6_e2m3", True, "int8"),
    "fp8": ("fp8_e4m3@64", True, "none"),
    "mxfp8": ("fp8_e4m3", True, "none"),
    "bfloat16": ("bfloat16", True, "none"),
    "float16": ("float16", True, "none"),
    "float32": ("float32", True, "none"),
}


def matrix(n: int, k: int, element: str, symmetric: bool) -> torch.Tensor | PackedWeight:
    if element in FLOATS:
        return torch.randn(n, k).to(getattr(torch, element))
    name, _, group = element.partition("@")
    scheme = QuantScheme(name, int(group or 32), symmetric)  # type: ignore[arg-type]
    ranges = {"int4": (-8, 8) if symmetric else (0, 16), "int8": (-128, 128), "fp8_e4m3": (0, 127), "fp6_e2m3": (0, 64)}
    low, high = ranges.get(name, (0, 16))
    scales = torch.rand(n, k // scheme.group_size).half().float()
    levels = torch.linspace(-1, 1, 16) if name in LISTED else None
    return PackedWeight(torch.randint(low, high, (n, k), dtype=torch.int8), scales, None if symmetric else -8 * scales, scheme, levels)


def model(kernels: LinearKernels, shape: Shape, layers: int, element: str, symmetric: bool, dtype: torch.dtype) -> list[Weight]:
    sizes = matrices_of(shape).values()
    weights = []
    for n, k in sizes:
        source = matrix(n, k, element, symmetric)
        for _ in range(layers):
            weight = kernels.prepare(source, dtype)
            if not isinstance(weight, Weight):
                raise ConfigError(weight)
            weights.append(weight)
    return [weights[i * layers + layer] for layer in range(layers) for i in range(len(sizes))]


class _Recording:
    """Collects the calls of a step into a graph of the library; a plain list is enough where all sizes are fixed."""

    def __init__(self, runtime: Runtime) -> None:
        self.library = runtime.library
        self.graph = self.library.minfer_graph_create()
        self.tensors: list[torch.Tensor] = []

    def allocate(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        self.tensors.append(torch.empty(shape, dtype=dtype))
        return self.tensors[-1]

    def hold(self, tensor: torch.Tensor) -> None:
        self.tensors.append(tensor)

    def call(self, kernel, values) -> None:  # type: ignore[no-untyped-def]
        self.library.minfer_graph_add(self.graph, kernel.handle, kernel.pack(values))


def best_seconds(runtime: Runtime, weights: list[Weight], rows: int, dtype: torch.dtype, seconds: float) -> float:
    """The shortest of the runs that fit into `seconds`, of a step of `rows` tokens."""
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]).to(dtype) for weight in weights}
    runtime.recorder = recording = _Recording(runtime)  # type: ignore[assignment]
    for weight in weights:
        weight.linear(inputs[weight.shape[1]], None)
    runtime.recorder = None
    clock: Callable[[], float] = time.thread_time if runtime.threads == 1 else time.perf_counter
    best, end = float("inf"), time.perf_counter() + seconds
    for run in range(1_000_000):
        start = clock()
        runtime.library.minfer_graph_run(recording.graph, b"", runtime.pool)
        best = min(best, clock() - start)
        if run >= 3 and time.perf_counter() > end:
            break
    runtime.library.minfer_graph_destroy(recording.graph)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minfer.kernels.cpu.linear_bench", description="Times a model's matrix products.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="model whose sizes are used, without its head and experts")
    parser.add_argument("--layers", type=int, default=30, help="copies of a layer's matrices: together more than any cache holds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["q4_1", "q8_0", "bfloat16"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 512])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each number of rows")
    options = parser.parse_args()
    runtime = Runtime(options.threads)
    ceilings = measure(runtime)
    print(f"{runtime.isa}, {runtime.threads} threads, load {os.getloadavg()[0]:.1f}: reading {ceilings.bandwidth / 1e9:.1f} GB/s")
    results = []
    for kind in options.kinds:
        element, symmetric, activation = KINDS[kind]
        dtype = getattr(torch, element) if element in FLOATS else torch.bfloat16
        weights = model(LinearKernels(runtime, activation), SHAPES[options.shape], options.layers, element, symmetric, dtype)
        moved, parameters = sum(w.nbytes for w in weights), sum(w.shape.numel() for w in weights)
        unit = "int8" if activation == "int8" else "float32" if DTYPES[dtype] != DTYPES[torch.bfloat16] else "bfloat16"
        for rows in options.rows:
            best = best_seconds(runtime, weights, rows, dtype, options.seconds)
            operations = 2 * parameters * rows
            floor = max(moved / ceilings.bandwidth, operations / (getattr(ceilings, unit) or ceilings.float32))
            line = f"{kind:10}{rows:5} rows {best * 1e3:9.3f} ms {moved / best / 1e9:7.1f} GB/s {operations / best / 1e9:7.0f} Gop/s"
            print(f"{line} {floor / best:5.0%} of the floor {rows / best:9.0f} tokens/s", flush=True)
            results.append({"kind": kind, "rows": rows, "seconds": best, "bytes": moved, "operations": operations, "floor": floor})
    print(json.dumps({"isa": runtime.isa, "threads": runtime.threads, "shape": options.shape, **vars(ceilings), "results": results}))


if __name__ == "__main__":
    main()
