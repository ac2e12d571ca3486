"""`python -m compare.host_time`: would this host keep a fast GPU busy? Decode steps of the real engine over a simulated device.

Every case is `minfer bench MODEL --simulate GPU`, all in one process. Writes `results/host-time-<date>-<host>.json`, to which parts that
are run by themselves (`--models`, `--gpus`, `--batches`) are added; of a case that is run `--again` the quieter run is kept. The tables of
`docs/host-time.md` are made from that file alone (`--from`).
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import socket
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compare import machine
from compare.ablation import ROOT, fill
from minfer.cli.measure import Shape
from minfer.cli.simulated import PARTS, simulate
from minfer.config import EngineConfig
from minfer.engine.outputs import OutputKind

PAGE = ROOT / "docs" / "host-time.md"
MODELS = ("llama2-7b", "llama3.1-8b", "qwen2.5-0.5b")
WEIGHTS = {"bf16": "none", "fp8": "fp8", "int4": "int4"}  # and the value of --quant
BATCHES = (1, 64, 256)
PROMPT, OUTPUT = 256, 100
VARIANTS: tuple[tuple[str, OutputKind], ...] = (("off", "delta"), ("on", "delta"), ("on", "final"))
HARDEST = ("qwen2.5-0.5b", "int4")  # the shortest steps: whose parts are shown
MORE_BATCHES = (64, 256)
NGRAM = {"speculative": "ngram", "ngram_min_match": 1, "num_draft_tokens": 4, "adaptive_drafts": False}
# What requests may ask for beside, and what it is called: (temperature, whether they have a grammar, settings).
MORE: dict[str, tuple[float, bool, dict[str, Any]]] = {
    "drawn at temperature 0.8": (0.8, False, {}),
    "grammars": (0.0, True, {}),
    "4 n-gram drafts each, nearly all wrong": (0.0, False, NGRAM),
}

Case = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.host_time", description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--gpus", nargs="+", default=("h200", "h100"))
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, choices=BATCHES)
    parser.add_argument("--from", dest="source", type=Path, help="make the page from an earlier run's file")
    parser.add_argument("--again", action="store_true", help="beside what the file has: of the runs of a case the quietest is kept")
    options = parser.parse_args()
    source = options.source or measure(options.models, options.gpus, options.batches, again=options.again)
    page = fill(PAGE.read_text(), tables(json.loads(source.read_text())))
    PAGE.write_text(page)
    print(f"{source} -> {PAGE}")


def measure(models: Sequence[str], gpus: Sequence[str], batches: Sequence[int], *, again: bool) -> Path:
    target = ROOT / "results" / f"host-time-{time.strftime('%Y-%m-%d')}-{socket.gethostname()}.json"
    earlier: Iterable[Case] = json.loads(target.read_text())["cases"] if target.exists() else ()
    cases = {name_of(case): case for case in earlier}
    for model, gpu, weights, batch in itertools.product(models, gpus, WEIGHTS, batches):
        asked: list[tuple[str, OutputKind, float, bool, dict[str, Any]]]
        asked = [(overlap, outputs, 0.0, False, {}) for overlap, outputs in VARIANTS]
        if (model, weights) == HARDEST and batch in MORE_BATCHES:
            asked += [("auto" if more[-1] else "on", "delta", *more) for more in MORE.values()]
        for overlap, outputs, temperature, guided, settings in asked:
            case = run(model, gpu, weights, batch, overlap, outputs, temperature, guided, **settings)
            before = cases.get(name_of(case))
            case["runs"] = before["runs"] + 1 if again and before else 1
            if again and before and before["host_ms"] < case["host_ms"]:  # others on the machine can only have added to it
                case = {**before, "runs": case["runs"]}
            cases[name_of(case)] = case
            print(f"{model} {weights} on {gpu}, batch {batch}, overlap {overlap}, {outputs}: {case['step_ms']}", file=sys.stderr)
    versions = {"torch": torch.__version__}
    facts = {"machine": machine.describe(), "versions": versions, "command": "python -m compare.host_time"}
    target.write_text(json.dumps({**facts, "cases": list(cases.values())}, indent=1) + "\n")
    return target


def run(
    model: str,
    gpu: str,
    weights: str,
    batch: int,
    overlap: str,
    outputs: OutputKind,
    temperature: float = 0.0,
    guided: bool = False,
    **more: Any,
) -> Case:
    settings: dict[str, Any] = {"max_num_seqs": 256, "max_model_len": 1024, "tokenizer": "smollm2-135m", **more}
    config = EngineConfig(model=model, quant=WEIGHTS[weights], overlap=overlap, **settings)  # type: ignore[arg-type]
    gc.unfreeze()  # the case before
    return simulate(config, gpu, Shape(PROMPT, OUTPUT, batch), temperature, outputs, guided=guided)


def name_of(case: Case) -> tuple[Any, ...]:
    model = case["model"], case["gpu"], case["weights"], case["batch_size"]
    return *model, case["overlap"], case["outputs"], case["temperature"], case["guided"], case["speculative"]


def tables(results: Mapping[str, Any]) -> str:
    cases = {name_of(case): case for case in results["cases"]}
    host = results["machine"]
    said = (
        f"Host: {host.get('cpu', 'this CPU')}, Python {host['python']}, torch {results['versions']['torch']}; prompts of {PROMPT} tokens, "
        f"{OUTPUT} generated, with text; medians, and 99th percentiles behind a slash, of the quietest run where there were several "
        f"(others on the machine only add to it); `{results['command']}`, and again with `--again`. The first columns are "
        "of requests that are told each token, as a server's streams are; *offline* are those that are told their text at the end, as "
        "from `LLM.generate`."
    )
    lines = [said, ""]
    for gpu in dict.fromkeys(case["gpu"] for case in results["cases"]):
        lines += [*_steps(cases, gpu), ""]
    return "\n".join([*lines, *_parts(cases)]) + "\n"


def _steps(cases: Mapping[tuple[Any, ...], Case], gpu: str) -> list[str]:
    lines = [
        f"| {gpu.upper()}, ms per decode step | batch | device | host | idle, no overlap | idle, overlap | tokens/s, overlap : none "
        "| host, offline | idle, offline, overlap |",
        "|---" * 9 + "|",
    ]
    for model, weights, batch in itertools.product(MODELS, WEIGHTS, BATCHES):
        keys = [(model, gpu, weights, batch, overlap == "on", outputs, 0.0, False, "none") for overlap, outputs in VARIANTS]
        if not all(key in cases for key in keys):
            continue
        off, on, offline = (cases[key] for key in keys)
        gain = off["step_ms"][0] / on["step_ms"][0]
        cells = [f"{on['device_ms'][0]:.2f}", *(_pair(of) for of in (on["host_ms"], off["idle_ms"], on["idle_ms"])), f"{gain:.2f}x"]
        cells += [_pair(offline["host_ms"]), _pair(offline["idle_ms"])]
        lines.append(f"| {model} {weights} | {batch} | {' | '.join(cells)} |")
    return lines


def _parts(cases: Mapping[tuple[Any, ...], Case]) -> list[str]:
    model, weights = HARDEST
    lines = [
        f"| ms of the host's time, {model} {weights} | {' | '.join(PARTS)} | all | of which launching |",
        "|---" * (len(PARTS) + 3) + "|",
    ]
    shown = {
        f"batch {batch}{said}": (batch, True, outputs, 0.0, False, "none")
        for batch, (outputs, said) in itertools.product(BATCHES, (("delta", ""), ("final", ", offline")))
    }
    for batch, (said, (temperature, guided, settings)) in itertools.product(MORE_BATCHES, MORE.items()):
        drafts = settings.get("speculative", "none")
        shown[f"batch {batch}, {said}"] = (batch, drafts == "none", "delta", temperature, guided, drafts)
    for said, key in shown.items():
        case = cases.get((model, "h200", weights, *key))
        if case is not None:
            cells = [_pair(case["host_parts_ms"][part]) for part in PARTS]
            lines.append(f"| {said} | {' | '.join(cells)} | {_pair(case['host_ms'])} | {case['launch_ms'][0]:.3f} |")
    return lines


def _pair(spread: Sequence[float]) -> str:
    return f"{spread[0]:.2f} / {spread[1]:.2f}"


if __name__ == "__main__":
    main()
