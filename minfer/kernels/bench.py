"""Times every op against what the machine can do: `python -m minfer.kernels.bench [--device cuda] [--op attention linear]`.

The ceilings come first (memory bandwidth, peak of each kind of multiplication, measured); each op's share of its floor

    floor = max(bytes that must move / bandwidth, operations / peak)

says how much is left to gain, and `library` how long torch's own kernel for the work takes (dense products, scaled_dot_product_attention):
for a quantised product that is the dense one, which it has to beat. Operands rotate through more memory than any cache holds, as a
model's weights do. The last line of the output is one JSON document, with `--json` the only one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from minfer.errors import ConfigError
from minfer.kernels import Ops, select_ops
from minfer.kernels.bench_cases import cases
from minfer.kernels.bench_devices import CpuMachine, GpuMachine, Machine
from minfer.kernels.bench_shapes import SHAPES, Call, Case, Sizes

OPS = (
    "rms_norm", "rotary_kv", "lora", "act_mul", "argmax", "sample", "likeliest", "logprobs", "forbid", "attention", "moe", "linear",
)  # fmt: skip
LIBRARY = "library"


def floor_us(case: Case, ceilings: Mapping[str, float]) -> float:
    peak = ceilings.get(case.unit) or ceilings["float32"]
    return max(case.bytes / ceilings["bandwidth"], case.operations / peak) * 1e6


def calls_of(case: Case, tables: Mapping[str, Ops], machine: Machine) -> dict[str, list[Call]]:
    """For each contender the same work on as many operands as it takes to leave the caches. Raises ConfigError for too little memory."""
    copies = max(1, min(32, -(-machine.cache_bytes // case.bytes))) if case.bytes > 65536 else 1
    needed = ((case.memory or case.bytes) * copies + case.common) * (len(tables) + 1)
    if needed > machine.free_bytes():
        raise ConfigError(f"needs {needed / 2**30:.1f} GiB of memory")
    calls: dict[str, list[Call]] = {}
    for name, ops in tables.items():
        first = case.make(ops)
        if first is not None:
            calls[name] = [first, *(call for _ in range(copies - 1) if (call := case.make(ops)) is not None)]
    if not calls:
        raise ConfigError("no backend has a kernel for it")
    if case.library is not None:
        calls[LIBRARY] = [case.library() for _ in range(copies)]
    return calls


def measure_case(case: Case, tables: Mapping[str, Ops], machine: Machine, ceilings: Mapping[str, float], seconds: float) -> list[Any]:
    """One entry for each contender."""
    times, floor = machine.time(calls_of(case, tables, machine), seconds), floor_us(case, ceilings)
    library = times.get(LIBRARY)
    entries = []
    for name, values in times.items():
        best = values[0]
        entry = {
            "op": case.op,
            "case": case.name,
            "backend": name,
            "median_us": statistics.median(values),
            "best_us": best,
            "floor_us": floor,
            "share_of_roofline": floor / best,
            "gb_per_s": case.bytes / best / 1e3,
            "tflop_per_s": case.operations / best / 1e6,
        }
        entries.append(entry | ({"library_over_ours": library[0] / best} if library and name != LIBRARY else {}))
    return entries


def measure_all(options: argparse.Namespace, machine: Machine, tables: Mapping[str, Ops], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Until all is done or the time is over; what was left out is named."""
    deadline = time.monotonic() + (options.seconds or float("inf"))
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    for shape in options.shape:
        sizes = Sizes(
            SHAPES[shape], getattr(torch, options.dtype), machine.device, options.context, machine.decode_rows, machine.rounds_inputs
        )
        found = False
        for rows in options.rows:
            for number, case in enumerate(case for case in cases(sizes, rows) if case.op in options.op):
                found = True
                if number == 0:
                    print(_title(f"{shape}, {rows} rows"), file=options.log)
                where = f"{shape}, {rows} rows, {case.name}"
                if time.monotonic() > deadline:
                    skipped.append(f"{where}: out of time")
                    continue
                try:
                    entries = measure_case(case, tables, machine, ceilings, options.each)
                except ConfigError as error:
                    skipped.append(f"{where}: {error}")
                    continue
                results += [{"shape": shape, "rows": rows, **entry} for entry in entries]
                for entry in entries:
                    print(_line(case, entry), file=options.log, flush=True)
        if not found:
            skipped.append(f"{shape}: has no {', '.join(options.op)} in steps of {', '.join(map(str, options.rows))} rows")
    return {"results": results, "skipped": skipped}


def _title(what: str) -> str:
    return f"\n{what:47}{'us':>11}{'best':>9}{'floor':>7}{'GB/s':>8}{'TFLOP/s':>9}{'x library':>10}"


def _line(case: Case, entry: Mapping[str, Any]) -> str:
    ratio = f"{entry['library_over_ours']:10.2f}" if "library_over_ours" in entry else ""
    times = f"{entry['median_us']:11.1f}{entry['best_us']:9.1f}{entry['share_of_roofline']:7.0%}"
    return f"{case.name:36} {entry['backend']:10}{times}{entry['gb_per_s']:8.0f}{entry['tflop_per_s']:9.2f}{ratio}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minfer.kernels.bench", description="Times every op against the machine's ceilings.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", choices=OPS, nargs="+", default=OPS, help="which ops (default: all)")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", help="models whose sizes are used")
    parser.add_argument("--rows", type=int, nargs="+", help="tokens a step: sequences that decode, or above 64 (a GPU: 256) one prompt")
    parser.add_argument("--context", type=int, nargs="+", help="tokens that a decoding sequence has")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--backends", nargs="+", help="tables of ops to time, beside torch's own kernels")
    parser.add_argument("--threads", type=int, default=None, help="of a CPU")
    parser.add_argument("--each", type=float, default=None, help="seconds spent on each op")
    parser.add_argument("--seconds", type=float, default=None, help="begin nothing new after so long")
    parser.add_argument("--json", action="store_true", help="print one JSON document to stdout, and everything else to stderr")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.shape = options.shape or [*(("llama2-7b", "llama3.1-8b") if on_gpu else ()), "smollm2-135m", "qwen3-30b-a3b"]
    options.rows = options.rows or ([1, 8, 64, 256, 512, 4096] if on_gpu else [1, 8, 512])
    options.context = options.context or ([128, 4096, 32768] if on_gpu else [512])
    options.backends = options.backends or (["triton"] if on_gpu else ["cpu", "reference"])
    options.each = options.each or (0.05 if on_gpu else 0.3)
    options.log = sys.stderr if options.json else sys.stdout
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda was asked for, but torch sees no CUDA or ROCm device")
    machine: Machine = GpuMachine() if options.device == "cuda" else CpuMachine(options.threads)
    tables = {name: select_ops(machine.device, getattr(torch, options.dtype), name, options.threads) for name in options.backends}
    about, ceilings = machine.describe(), machine.ceilings()
    peaks = ", ".join(f"{unit} {peak / 1e12:.3g} Top/s" for unit, peak in ceilings.items() if unit != "bandwidth" and peak)
    print(", ".join(f"{name} {value}" for name, value in about.items()), file=options.log)
    print(f"memory {ceilings['bandwidth'] / 1e9:.1f} GB/s; {peaks}", file=options.log)
    measured = measure_all(options, machine, tables, ceilings)
    for line in measured["skipped"]:
        print(f"left out: {line}", file=options.log)
    print(json.dumps({**about, "dtype": options.dtype, "ceilings": ceilings, **measured}))


if __name__ == "__main__":
    main()
