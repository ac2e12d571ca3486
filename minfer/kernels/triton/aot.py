"""Compiles every kernel, ahead of time and without a GPU, for the machines it is meant for: `python -m minfer.kernels.triton.aot`.

Speed can't be measured without a GPU, but much of what decides it can be read from the machine code: registers and spills (how many
programs fit a processor), shared memory (more than the target has fails at launch), the matrix instruction that a `tl.dot` became, and
how wide the loads are (16 bytes, or the memory's bandwidth is out of reach).

What is compiled is what would be launched: the wrappers are called with meta tensors of serving shapes, their launches are caught
before they reach a driver, and each is compiled with the types, the constants and the divisibility by 16 that Triton would have found.

`budgets.json` beside this file holds the result for each kernel and target. `--check` compares and fails on drift; `--update` writes it
and the table in docs/kernels-gpu.md. An LLVM error aborts a process, so each target is compiled in one of its own, and a target that
dies is reported with the kernel it died on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from minfer.errors import ConfigError
from minfer.kernels.triton import machine_code
from minfer.kernels.triton.targets import Target

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx90a": GPUTarget("hip", "gfx90a", 64),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"cuda:80": 163 * 1024, "cuda:90": 227 * 1024, "hip:gfx90a": 64 * 1024, "hip:gfx942": 64 * 1024}
BUDGETS = Path(__file__).with_name("budgets.json")
Report = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: what Triton would specialise on, and the launch options."""

    function: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[str]
    options: dict[str, int]
    grid: tuple[int, ...] = field(repr=False, default=())  # what is compiled doesn't depend on it


@contextmanager
def launches_caught() -> Iterator[list[Launch]]:
    """Within, a launch of any kernel is noted in the list and not executed."""
    caught: list[Launch] = []

    def run(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        caught.append(_specialize(function, args, kwargs, grid))

    with mock.patch.object(JITFunction, "run", run):
        yield caught


def _specialize(function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], grid: tuple[int, ...]) -> Launch:
    values = dict(zip(function.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in function.arg_names}
    signature, constants, divisible = {}, {}, []
    for parameter in function.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible.append(name)  # torch aligns what it allocates, and the slices that a layer makes are multiples of 16 bytes
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    options = {name: value for name, value in kwargs.items() if name not in function.arg_names}
    return Launch(function, signature, constants, divisible, options, grid)


_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
}


def compile_launch(launch: Launch, target: str) -> CompiledKernel:
    position = {name: (n,) for n, name in enumerate(launch.function.arg_names)}
    attrs = {position[name]: [["tt.divisibility", 16]] for name in launch.divisible}
    constants = {position[name]: value for name, value in launch.constants.items()}
    source = ASTSource(launch.function, launch.signature, constants, attrs)
    return triton.compile(source, target=TARGETS[target], options=launch.options)


def report_of(compiled: CompiledKernel, target: str) -> Report:
    """Of one kernel for one target, as it stands in budgets.json."""
    code = machine_code.of_cubin(compiled.asm["cubin"]) if target.startswith("cuda") else machine_code.of_amdgcn(compiled.asm["amdgcn"])
    return {"shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps, **code}


def compile_target(target: str, only: str) -> dict[str, Report]:
    """Every kernel of every case whose name contains `only`. The name of each is printed to stderr before it is compiled."""
    from minfer.kernels.triton import TritonBackend  # under the interpreter, there are no kernels to compile
    from minfer.kernels.triton.aot_cases import CASES, DTYPE, META

    backend = TritonBackend(META, DTYPE, Target(132, target, SHARED_LIMIT[target]))
    reports: dict[str, Report] = {}
    seen: set[str] = set()
    for name, case in CASES.items():
        with launches_caught() as caught:
            case(backend)
        for launch in caught:
            if repr(launch) in seen:
                continue  # a second pass that another product's has been already
            seen.add(repr(launch))
            if only not in name:
                continue  # only now: what an earlier case launched is that one's, whichever are compiled
            label = name if len(caught) == 1 else f"{name}, {launch.function.fn.__name__.removesuffix('_kernel')}"
            label = next(name for name in (label, *(f"{label} {n}" for n in range(2, 9))) if name not in reports)
            print(label, file=sys.stderr, flush=True)
            reports[label] = report_of(compile_launch(launch, target), target)
    return reports


def compile_all(targets: list[str], only: str = "") -> dict[str, dict[str, Report]]:
    """kernel -> target -> report, each target in a process of its own. Raises ConfigError for one that dies."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    reports: dict[str, dict[str, Report]] = {}
    for target in targets:
        command = [sys.executable, "-m", __spec__.name, "--one-target", target, "--only", only]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = "\n".join(done.stderr.splitlines()[-15:])
            raise ConfigError(f"compiling for {target} failed, on the last kernel named here:\n{tail}")
        for label, report in json.loads(done.stdout.splitlines()[-1]).items():
            reports.setdefault(label, {})[target] = report
    return reports


def faults(reports: dict[str, dict[str, Report]]) -> list[str]:
    """What would fail or crawl on a device whatever the budget says: spills, and more shared memory than there is."""
    found = []
    for label, by_target in reports.items():
        for target, report in by_target.items():
            if report["spills"]:
                found.append(f"{label} for {target}: {report['spills']} bytes of registers spilled")
            if report["shared"] > SHARED_LIMIT[target]:
                found.append(f"{label} for {target}: {report['shared']} bytes of shared memory, of {SHARED_LIMIT[target]}")
    return found


def drift(reports: dict[str, dict[str, Report]], budget: Report) -> list[str]:
    """Where the reports differ from the budget, which holds for one version of Triton only."""
    if budget["triton"] != triton.__version__:
        return []
    found = []
    for label, by_target in reports.items():
        for target, report in by_target.items():
            expected = budget["kernels"].get(label, {}).get(target)
            if expected is None:
                found.append(f"{label} for {target} has no budget")
            elif expected != report:
                names = [name for name in report if report[name] != expected.get(name)]
                found.append(f"{label} for {target}: " + ", ".join(f"{n} {expected.get(n)} -> {report[n]}" for n in names))
    return found


def owner(label: str, cases: Iterable[str]) -> str | None:
    """The case that a label is of: itself, or followed by a kernel's name. None where no case has that name any more."""
    return max((name for name in cases if re.fullmatch(re.escape(name) + r"(, \w+( \d)?)?", label)), key=len, default=None)


def joined(budget: Report, reports: dict[str, dict[str, Report]], cases: Iterable[str], only: str) -> dict[str, dict[str, Report]]:
    """The budget's kernels with these reports in place of those that the compiled of all `cases` had, for their targets.

    Compiled is every case whose name contains `only`. What no case has is dropped where all were compiled, and else kept.
    """
    if budget["triton"] != triton.__version__ and only:
        raise ConfigError(f"the budget is of Triton {budget['triton']}: update it without --only")
    compiled = {target for by_target in reports.values() for target in by_target}
    names = list(cases)
    kernels: dict[str, dict[str, Report]] = {}
    for label, by_target in budget["kernels"].items():
        of = owner(label, names)
        stays = bool(only) and (of is None or only not in of)
        kernels[label] = {target: report for target, report in by_target.items() if stays or target not in compiled}
    for label, by_target in reports.items():
        kernels[label] = kernels.get(label, {}) | by_target
    return {label: by_target for label, by_target in kernels.items() if by_target}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minfer.kernels.triton.aot", description="Compiles every kernel for GPUs that aren't here."
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--check", action="store_true", help="fail where the result differs from budgets.json")
    parser.add_argument("--update", action="store_true", help="write budgets.json and docs/kernels-gpu.md, with what was compiled")
    parser.add_argument("--one-target", choices=TARGETS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one_target:
        print(json.dumps(compile_target(options.one_target, options.only)))
        return
    reports = compile_all(options.targets, options.only)
    found = faults(reports)
    if options.check:
        found += drift(reports, json.loads(BUDGETS.read_text()))
    for label, by_target in reports.items():
        for target, report in by_target.items():
            print(f"{label:48} {target:11} " + " ".join(f"{name}={value}" for name, value in report.items()))
    if options.update:
        from minfer.kernels.triton.aot_cases import CASES
        from minfer.kernels.triton.aot_page import write_page

        kernels = joined(json.loads(BUDGETS.read_text()), reports, CASES, options.only)
        budget = {"triton": triton.__version__, "kernels": kernels}
        BUDGETS.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
        write_page(budget)
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
