"""Everything that can be learnt from one GPU in nine minutes: `make gpu`, or `python -m compare.gpu`.

GPUs are lent for half an hour and the machine that has one has little else: torch, triton, transformers, tokenizers, safetensors,
pytest. So nothing here is installed, built or downloaded, nothing needs the command line's packages, and a run answers all at once:

    tests       the Triton kernels against float64, an engine on them, sampling on the device
    kernels     `minfer.kernels.bench`: every op against this device's own ceilings and the vendor's libraries
    bench       decode and prefill of llama2-7b's shape with random weights, in bf16, int4 and fp8, at batch 1, 8, 64, 256
    offline     256 requests of 100-1024 tokens in and out: minfer, then transformers in static batches

Each stage is a process: one that dies or hangs costs its own share of the time and nothing else. A stage may use what the earlier ones
left, in proportion to its weight. After each, everything known so far is written to one JSON file, so that a run that is cut off counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECONDS = 530.0  # for everything, so that nine minutes are enough
MODEL = "llama2-7b"
FORMATS = ("bf16", "int4", "fp8")


@dataclass(frozen=True)
class Stage:
    """`python -m MODULE ARGUMENTS --seconds N`, where N is what it may take; it prints one JSON object as its last line."""

    name: str
    weight: float  # its share of the time that is left, beside those of the stages still to come
    module: str
    arguments: tuple[str, ...]


def stages(model: str) -> list[Stage]:
    kernels = ("--device", "cuda", "--shape", model, "--json")
    listed = [Stage("tests", 130, "compare.gpu_stages", ("tests",)), Stage("kernels", 110, "minfer.kernels.bench", kernels)]
    listed += [Stage(f"bench {name}", 65, "compare.gpu_stages", ("bench", model, "--format", name)) for name in FORMATS]
    listed += [Stage(f"offline {engine}", 70, "compare.gpu_stages", ("offline", model, "--engine", engine)) for engine in ENGINES]
    return listed


ENGINES = ("minfer", "transformers")


def run_stage(stage: Stage, seconds: float) -> dict[str, Any]:
    """What came of it: `state` is done, failed or cut off; `result` its JSON, `said` the end of what it printed otherwise."""
    command = [sys.executable, "-m", stage.module, *stage.arguments, "--seconds", f"{seconds:.0f}"]
    started = time.monotonic()
    # A session of its own, so that the processes which a stage started end with it.
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=seconds + 5)
        state = "done" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        state = "cut off"
    outcome: dict[str, Any] = {"state": state, "seconds": round(time.monotonic() - started, 1), "allowed_seconds": round(seconds, 1)}
    outcome["command"] = " ".join(["python", *command[1:]])
    lines = said.strip().splitlines()
    result = next((line for line in reversed(lines) if line.startswith("{")), None)  # a library may have said goodbye after it
    try:
        outcome["result"] = json.loads(result or "")
    except json.JSONDecodeError:
        outcome["state"] = "failed" if state == "done" else state
    if outcome["state"] != "done":
        outcome["said"] = [line.replace(str(ROOT), ".") for line in lines[-60:]]
    return outcome


def machine() -> dict[str, Any]:
    """The device and the versions that decide its speed."""
    import importlib.metadata
    import platform

    import torch

    properties: Any = torch.cuda.get_device_properties(0)
    facts = {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
    }
    for package in ("torch", "triton", "transformers"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def why_not() -> str | None:
    """What is missing, in a sentence; None where a run can begin."""
    try:
        import torch
    except ModuleNotFoundError:
        return "make gpu needs torch built for CUDA or ROCm, and this Python has none"
    if not torch.cuda.is_available():
        return f"make gpu needs a CUDA or ROCm device, and torch {torch.__version__} sees none; `make test` checks the kernels without one"
    missing = [name for name in ("triton", "transformers", "pytest") if _absent(name)]
    return f"make gpu needs {', '.join(missing)} beside torch; this Python lacks them" if missing else None


def _absent(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compare.gpu", description="Tests and measures minfer on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu", help="folder for the JSON file")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all stages together")
    parser.add_argument("--only", default="", help="stages whose name contains this")
    parser.add_argument("--model", default=MODEL, help="whose shape the random weights have")
    options = parser.parse_args(arguments)
    reason = why_not()
    if reason is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    facts, now = machine(), datetime.datetime.now(datetime.timezone.utc)
    slug = re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{now:%Y-%m-%d-%H%M}-{slug}.json"
    report: dict[str, Any] = {"when": f"{now:%Y-%m-%dT%H:%MZ}", "command": "make gpu", "machine": facts, "stages": {}}
    left = [stage for stage in stages(options.model) if options.only in stage.name]
    deadline = time.monotonic() + options.seconds
    while left:
        stage, weights = left[0], sum(stage.weight for stage in left)
        allowed = max(1.0, (deadline - time.monotonic()) * stage.weight / weights)
        print(f"{stage.name}: up to {allowed:.0f} s", flush=True)
        outcome = run_stage(stage, allowed)
        report["stages"][stage.name] = outcome
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"  {outcome['state']} after {outcome['seconds']} s", flush=True)
        for line in outcome.get("said", [])[-15:]:
            print("  | " + line)
        left.pop(0)
    print(file)
    return 0 if all(outcome["state"] == "done" for outcome in report["stages"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
