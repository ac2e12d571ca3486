"""results/gpu/predicted-FAMILY.json, and docs/performance-gpu.md out of all of those files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import triton

from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.aot import SHARED_LIMIT, Launch, compile_launch, launches_caught
from minfer.kernels.triton.aot_cases import DTYPE, META
from minfer.kernels.triton.cost.compiled import code_of
from minfer.kernels.triton.cost.devices import DEVICES, Device
from minfer.kernels.triton.cost.family import Case, Change, Check, Family
from minfer.kernels.triton.cost.predict import Code, floor, predict
from minfer.kernels.triton.targets import Target

ROOT = Path(__file__).parents[4]
RESULTS = ROOT / "results" / "gpu"
PAGE = ROOT / "docs" / "performance-gpu.md"
Json = dict[str, Any]


class Compiler:
    """Compiles a launch once for each target, however many cases and devices share it."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, str], Code] = {}

    def code(self, launch: Launch, target: str) -> Code:
        key = (repr(launch), target)
        if key not in self._codes:
            self._codes[key] = code_of(compile_launch(launch, target), target)
        return self._codes[key]


def predict_family(family: Family, compiler: Compiler, only: str = "") -> Json:
    rows = [
        _case(case, DEVICES[name], compiler)
        for case in family.cases
        if only in case.name
        for name in case.devices
    ]  # fmt: skip
    by_name = {(row["case"], row["device"]): row for row in rows}
    checks = [_check(check, by_name[check.case, check.device]) for check in family.checks if (check.case, check.device) in by_name]
    return {
        "family": family.name,
        "what": "predictions of a model from compiled code; nothing was run on a GPU",
        "command": f"python -m minfer.kernels.triton.cost --family {family.name}",
        "triton": triton.__version__,
        "cases": rows,
        "checks": checks,
    }


def _case(case: Case, device: Device, compiler: Compiler) -> Json:
    target = Target(device.processors, device.target, SHARED_LIMIT[device.target])
    with launches_caught() as caught:
        case.call(TritonBackend(META, DTYPE, target))
    launches, seconds = [], 0.0
    for launch in caught:
        kernel = launch.function.fn.__name__
        code, work = compiler.code(case.compiled_as(launch), device.target), case.work(kernel, launch)
        prediction = predict(code, work, device)
        seconds += prediction.seconds
        entry = {"kernel": kernel.removesuffix("_kernel"), **_compiled(code), **prediction.row()}
        if work.weights:
            entry["per_weight"] = round(sum(entry["loop"].values()) * code.warps * device.lanes / work.weights, 2)
        launches.append(entry)
    least = floor(device, case.bytes, case.operations, case.unit)
    longest = max(launches, key=lambda entry: float(entry["predicted_us"]))
    return {
        "case": case.name,
        "device": device.name,
        "predicted_us": round(1e6 * seconds, 2),
        "floor_us": round(1e6 * least, 2),
        "share": round(least / seconds, 3),
        "gb_per_s": round(case.bytes / seconds / 1e9),
        "tflop_per_s": round(case.operations / seconds / 1e12, 1),
        "bound": longest["bound"],
        "launches": launches,
    }


def _compiled(code: Code) -> Json:
    loop = max(code.loops, key=len, default=[])
    return {
        "registers": code.registers,
        "spills": code.spills,
        "shared": code.shared,
        "warps": code.warps,
        "loop": dict(Counter(instruction.pipe for instruction in loop).most_common()),
    }


def _check(check: Check, row: Json) -> Json:
    ratio = row["predicted_us"] / check.published_us
    return {
        "case": check.case, "device": check.device, "published_us": round(check.published_us, 1), "predicted_us": row["predicted_us"],
        "ratio": round(ratio, 2), "low": check.low, "high": check.high, "source": check.source,
    }  # fmt: skip


def write(result: Json, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1)
    text = re.sub(r"\{\s+([^{}\[\]]{1,100}?)\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m.group(1)) + "}", text)
    path.write_text(text + "\n")


_INTRO = """\
# GPU performance, predicted

**Nothing on this page was measured.** No GPU was at hand; these are predictions of a small model
(`minfer/kernels/triton/cost/`), made from the machine code that each kernel compiles to. The model runs the warps that share a quarter
of a processor cycle by cycle: each issues its instructions in order, waits for registers, barriers and copies in flight, and shares the
pipes and the memory with the others. Peaks, bandwidths and latencies are other people's, cited in `cost/devices.py`.

Made by `python -m minfer.kernels.triton.cost` from `results/gpu/predicted-*.json`. What `make gpu` measures goes to `results/gpu/` too.

- *floor*: the bytes that can't be avoided at the rate of a plain streaming read on that device, or the operations at the matrix units'
  peak on paper, whichever takes longer. *share* is the floor over the prediction.
- *bound*: what is in use at least 70% of the time in the kernel's main loop; *latency* where nothing is.
- *programs* that have work, and how many of them a processor holds at once (*resident*).
- *turn*: cycles of a turn of the main loop at that crowding.
"""


def render(families: Sequence[Family], results: dict[str, Json], before: dict[str, Json]) -> str:
    """The page; `results` and `before` by the family's name."""
    lines = [_INTRO]
    for family in families:
        if family.name in results:
            lines += _section(family, results, before.get(family.name))
    return "\n".join(lines)


def _section(family: Family, results: dict[str, Json], before: Json | None) -> list[str]:
    result = results[family.name]
    lines = [f"## {family.title}", ""]
    if family.intro:
        lines += [family.intro, ""]
    if result["checks"]:
        lines += ["### The model against what was published", "", _CHECKED, ""]
        lines += _table("case | on | published us | predicted us | ratio | allowed | who", map(_check_row, result["checks"]))
    if family.changes and before:
        lines += ["### What the predictions changed", "", f"Before: `results/gpu/predicted-{family.name}-before.json`.", ""]
        for number, change in enumerate(family.changes, 1):
            lines += _change(number, change, result, before)
    for device in dict.fromkeys(row["device"] for row in result["cases"]):
        rows = [row for row in result["cases"] if row["device"] == device]
        lines += [f"### {family.title} on {device}, predicted", ""]
        lines += _table("case | predicted us | floor us | share | bound | GB/s | TFLOP/s", map(_case_row, rows))
        lines += _table(
            "launch | registers | shared KiB | warps | programs | resident | turn | instructions of a turn, by pipe",
            (_launch_row(row, launch) for row in rows for launch in row["launches"]),
        )
    if family.more is not None:
        lines += family.more(results)
    if family.first:
        lines += ["### What a run on a device must check first", ""]
        lines += [f"{number}. {text}" for number, text in enumerate(family.first, 1)] + [""]
    return lines


_CHECKED = "Other people's kernels on the same work: the prediction for ours has to lie within the allowed multiple of their time."


def _table(head: str, rows: Iterable[str]) -> list[str]:
    return [f"| {head} |", "|" + "---|" * (head.count("|") + 1), *rows, ""]


def _case_row(row: Json) -> str:
    cells = (row["case"], row["predicted_us"], row["floor_us"], f"{row['share']:.0%}", row["bound"], row["gb_per_s"], row["tflop_per_s"])
    return "| " + " | ".join(map(str, cells)) + " |"


def _launch_row(row: Json, launch: Json) -> str:
    mix = ", ".join(f"{pipe} {count}" for pipe, count in launch["loop"].items())
    if "per_weight" in launch:
        mix += f"; {launch['per_weight']} a weight"
    cells = (
        f"{row['case']}: {launch['kernel']}", launch["registers"], f"{launch['shared'] / 1024:.1f}", launch["warps"], launch["programs"],
        launch["resident"], launch["turn_cycles"], mix,
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def _check_row(check: Json) -> str:
    cells = (check["case"], check["device"], check["published_us"], check["predicted_us"], check["ratio"])
    return "| " + " | ".join(map(str, cells)) + f" | {check['low']}..{check['high']} | {check['source']} |"


def _change(number: int, change: Change, result: Json, before: Json) -> list[str]:
    lines = [f"**{number}. {change.title}.** {change.why}", ""]
    rows = []
    for name, device in change.cases:
        old, new = (next(r for r in side["cases"] if (r["case"], r["device"]) == (name, device)) for side in (before, result))
        main = [max(side["launches"], key=lambda entry: float(entry["predicted_us"])) for side in (old, new)]
        cells = [name, device, f"{old['predicted_us']} -> {new['predicted_us']}", f"{old['share']:.0%} -> {new['share']:.0%}"]
        cells += [f"{main[0][key]} -> {main[1][key]}" for key in ("registers", "warps", "programs", "resident")]
        cells += [f"{sum(main[0]['loop'].values())} -> {sum(main[1]['loop'].values())}", f"{main[0]['bound']} -> {main[1]['bound']}"]
        rows.append("| " + " | ".join(cells) + " |")
    return lines + _table("case | on | predicted us | share | registers | warps | programs | resident | instructions | bound", rows)


def write_page(families: Sequence[Family]) -> None:
    def load(suffix: str) -> dict[str, Json]:
        paths = {family.name: RESULTS / f"predicted-{family.name}{suffix}.json" for family in families}
        return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}

    PAGE.write_text(render(families, load(""), load("-before")))
