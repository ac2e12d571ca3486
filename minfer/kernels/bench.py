"""Times every op on every backend against what the machine can do: `python -m minfer.kernels.bench`.

The ceilings come first (memory bandwidth, peak of each kind of multiplication, measured); each op's share of its floor

    floor = max(bytes that must move / bandwidth, operations / peak)

says how much is left to gain. Backends take turns, so that a noisy neighbour hits both, and operands rotate through more
memory than any cache holds, as a model's weights do. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from minfer.batch import Batch
from minfer.kernels import Ops, select_ops
from minfer.kernels.cpu.roofline import Roofline, measure
from minfer.kernels.cpu.runtime import Runtime
from minfer.kvcache import LayerCache
from minfer.quant import PackedWeight, QuantScheme

CACHE_BYTES = 96 * 1024 * 1024
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int


SHAPES = {
    "smollm2-135m": Shape(576, 9, 3, 64, 1536, 49152),
    "llama3.2-1b": Shape(2048, 32, 8, 64, 8192, 128256),
    "llama2-7b": Shape(4096, 32, 32, 128, 11008, 32000),
}


@dataclass(frozen=True)
class Case:
    """One op at one size. `make` builds a call on fresh operands of a backend's table."""

    name: str
    bytes: int  # that have to move at least once
    operations: int
    unit: str  # whose peak bounds the operations: float32, bfloat16 or int8
    make: Callable[[Ops], Callable[[], Any]]


def cases(shape: Shape, rows: int, context: int, dtype: torch.dtype) -> list[Case]:
    """A step of `rows` tokens: one prompt of that many, or at decode sizes as many sequences of `context` tokens."""
    size, h = dtype.itemsize, shape.hidden
    qkv = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    listed = [
        Case("rms_norm", 4 * rows * h * size, 0, "float32", lambda ops: _rms_norm(ops, rows, h)),
        Case("rotary", 2 * rows * qkv * size, 0, "float32", lambda ops: _rotary(ops, rows, shape)),
        Case("act_mul", 3 * rows * shape.inner * size, 0, "float32", lambda ops: _act_mul(ops, rows, shape.inner)),
        Case("argmax", min(rows, 64) * shape.vocab * 4, 0, "float32", lambda ops: _argmax(ops, rows, shape.vocab)),
        _attention_case(shape, rows, context, dtype),
    ]
    for name, n, k in (("qkv", qkv, h), ("o", h, shape.heads * shape.head_dim), ("gate_up", 2 * shape.inner, h), ("down", h, shape.inner)):
        for kind, width, unit in (("dense", size, "bfloat16"), ("int8", 1.0625, "int8"), ("int4", 0.625, "int8")):
            moved = int(n * k * width) + rows * (n + k) * size
            make = _linear_maker(kind, n, k, rows)
            listed.append(
                Case(f"linear {kind} {name} [{n},{k}]", moved, 2 * rows * n * k, unit if size == 2 or kind != "dense" else "float32", make)
            )
    return listed


def _rms_norm(ops: Ops, rows: int, width: int) -> Callable[[], Any]:
    x, residual, weight = (torch.randn(n, width).to(ops.dtype) for n in (rows, rows, 1))
    return lambda: ops.rms_norm(x, weight[0], 1e-5, residual)


def _rotary(ops: Ops, rows: int, shape: Shape) -> Callable[[], Any]:
    q, k = (torch.randn(rows, heads, shape.head_dim).to(ops.dtype) for heads in (shape.heads, shape.kv_heads))
    positions, table = torch.arange(rows, dtype=torch.int32), torch.rand(rows, shape.head_dim)
    return lambda: ops.rotary(q, k, positions, table)


def _act_mul(ops: Ops, rows: int, inner: int) -> Callable[[], Any]:
    x = torch.randn(rows, 2 * inner).to(ops.dtype)
    return lambda: ops.act_mul(x, "silu")


def _argmax(ops: Ops, rows: int, vocab: int) -> Callable[[], Any]:
    logits = torch.randn(min(rows, 64), vocab)
    return lambda: ops.argmax(logits)


def _attention_case(shape: Shape, rows: int, context: int, dtype: torch.dtype) -> Case:
    new, total, requests = (rows, rows, 1) if rows > 64 else (1, context, rows)
    seen = requests * (new * (total - new) + new * (new + 1) // 2)
    kv = 2 * requests * total * shape.kv_heads * shape.head_dim * dtype.itemsize
    operations = 4 * seen * shape.heads * shape.head_dim
    unit = "bfloat16" if dtype == torch.bfloat16 else "float32"
    name = f"attention {requests}x{new} over {total}"
    return Case(name, kv, operations, unit, lambda ops: _attention(ops, shape, new, total, requests))


def _attention(ops: Ops, shape: Shape, new: int, total: int, requests: int) -> Callable[[], Any]:
    width = -(-total // BLOCK_SIZE)
    blocks = torch.randperm(requests * width).int().view(requests, width)
    pages = (requests * width, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
    cache = LayerCache(torch.randn(pages).to(ops.dtype), torch.randn(pages).to(ops.dtype))
    start = torch.arange(requests + 1, dtype=torch.int32) * new
    none = torch.zeros(0, dtype=torch.int32)
    lens = torch.full((requests,), total, dtype=torch.int32)
    batch = Batch(none, none, none.long(), start, lens, blocks, none.long(), [new] * requests, [total] * requests)
    q = torch.randn(requests * new, shape.heads, shape.head_dim).to(ops.dtype)
    return lambda: ops.attention(q, cache, batch, shape.head_dim**-0.5)


def _linear_maker(kind: str, n: int, k: int, rows: int) -> Callable[[Ops], Callable[[], Any]]:
    def make(ops: Ops) -> Callable[[], Any]:
        matrix: torch.Tensor | PackedWeight
        if kind == "dense":
            matrix = torch.randn(n, k).to(ops.dtype)
        else:
            bits = 4 if kind == "int4" else 8
            codes = torch.randint(0, 16, (n, k)) if bits == 4 else torch.randint(-128, 128, (n, k))
            scales = torch.rand(n, k // 32).half().float()
            mins = -8 * scales if bits == 4 else None
            matrix = PackedWeight(codes.to(torch.int8), scales, mins, QuantScheme("int4" if bits == 4 else "int8", 32, mins is None))
        weight, x = ops.prepare(matrix), torch.randn(rows, k).to(ops.dtype)
        return lambda: ops.linear(x, weight)

    return make


def time_case(case: Case, tables: dict[str, Ops], seconds: float) -> dict[str, list[float]]:
    """Microseconds of each call, backend by backend, in turns."""
    copies = max(1, min(32, CACHE_BYTES // max(case.bytes, 1))) if case.bytes > 65536 else 1
    calls = {name: [case.make(ops) for _ in range(copies)] for name, ops in tables.items()}
    times: dict[str, list[float]] = {name: [] for name in tables}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 5:
        for name, variants in calls.items():
            start = time.perf_counter()
            variants[turn % copies]()
            times[name].append((time.perf_counter() - start) * 1e6)
        turn += 1
    return {name: sorted(values[1:]) for name, values in times.items()}


def floor_us(case: Case, ceilings: Roofline) -> float:
    peak = getattr(ceilings, case.unit) or ceilings.float32
    return max(case.bytes / ceilings.bandwidth, case.operations / peak) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minfer.kernels.bench", description="Times every op against the machine's ceilings.")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="model whose sizes are used")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512], help="tokens a step")
    parser.add_argument("--context", type=int, default=512, help="tokens a sequence has at decode (steps of up to 64 rows)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--backends", nargs="+", default=["cpu", "reference"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", default="", help="ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each op")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    tables = {name: select_ops(torch.device("cpu"), dtype, name, options.threads) for name in options.backends}
    runtime = Runtime(options.threads)
    torch.set_num_threads(runtime.threads)  # a table of compiled kernels takes torch's away, but here both compete
    ceilings = measure(runtime)
    print(f"{runtime.isa}, {runtime.threads} threads, load {os.getloadavg()[0]:.1f}: reading {ceilings.bandwidth / 1e9:.1f} GB/s; ", end="")
    print(", ".join(f"{unit} {getattr(ceilings, unit) / 1e9:.0f} Gop/s" for unit in ("float32", "bfloat16", "int8")))
    results = []
    for rows in options.rows:
        print(f"\n{rows} rows{'':35}" + "".join(f"{name + ' us':>14}{'best':>9}{'floor':>7}" for name in tables))
        for case in cases(SHAPES[options.shape], rows, options.context, dtype):
            if options.only not in case.name:
                continue
            times, floor = time_case(case, tables, options.seconds), floor_us(case, ceilings)
            line = f"{case.name:40}"
            for name, values in times.items():
                median = statistics.median(values)
                line += f"{median:14.1f}{values[0]:9.1f}{floor / values[0]:7.0%}"
                results.append(
                    {"op": case.name, "rows": rows, "backend": name, "median_us": median, "best_us": values[0], "floor_us": floor}
                )
            print(line, flush=True)
    print(json.dumps({"isa": runtime.isa, "threads": runtime.threads, "dtype": options.dtype, **vars(ceilings), "results": results}))


if __name__ == "__main__":
    main()
