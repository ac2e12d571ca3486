"""`python -m compare.ablation`: what each technique of the CPU backend is worth, one switch at a time.

Every variant is a run of `minfer bench` with other switches, in a process of its own; rounds go A B C ... A B C, so that a
machine whose speed drifts is unfair to nobody. Writes `results/ablation-<date>-<host>.json` and the table of
`docs/cpu-ablation.md`, which is made from that file alone (`--from FILE` makes it again).
"""

from __future__ import annotations

import argparse
import json
import shlex
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compare import machine

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cpu-ablation.md"
BEGIN, END = "<!-- generated:begin -->\n", "<!-- generated:end -->"

# What is switched on, line by line; each line keeps what the lines above it brought, where the two can go together.
VARIANTS: dict[str, str] = {
    "plain torch, bfloat16": "--backend reference --quant none --no-graphs",
    "compiled ops": "--backend cpu --quant none --no-graphs",
    "recorded step": "--backend cpu --quant none",
    "4-bit weights as they are in the file": "--backend cpu --activations none",
    "int8 activations": "--backend cpu",
}
WORKLOADS: dict[str, str] = {
    "batch 1": "--prompt-tokens 512 --output-tokens 64 --batch-size 1",
    "batch 32": "--prompt-tokens 128 --output-tokens 32 --batch-size 32",
}
FIGURES = {"decode_tokens_per_s": "decode, tokens/s", "prefill_tokens_per_s": "prefill, tokens/s"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.ablation", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3, help="runs of every variant")
    parser.add_argument("--from", dest="source", type=Path, help="make the page from an earlier run's file")
    options = parser.parse_args()
    source = options.source or measure(options.model, options.rounds)
    PAGE.write_text(fill(PAGE.read_text(), table(json.loads(source.read_text()))))
    print(f"{source} -> {PAGE}")


def measure(model: str, rounds: int) -> Path:
    runs: list[dict[str, Any]] = []
    for number in range(rounds):
        for workload, shape in WORKLOADS.items():
            for variant, switches in VARIANTS.items():
                command = f"minfer bench {model} {shape} {switches} --repeats 3 --warmup 1 --json"
                print(f"round {number + 1} of {rounds}: {workload}, {variant}", file=sys.stderr)
                done = subprocess.run([sys.executable, "-m", *shlex.split(command)], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"`{command}` failed: {done.stderr.strip() or done.stdout.strip()}")
                runs.append({"workload": workload, "variant": variant, "command": command, "result": json.loads(done.stdout)})
    target = ROOT / "results" / f"ablation-{time.strftime('%Y-%m-%d')}-{socket.gethostname()}.json"
    target.parent.mkdir(exist_ok=True)
    facts = {"machine": machine.describe(), "model": model, "rounds": rounds, "command": f"python -m compare.ablation --rounds {rounds}"}
    target.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")
    return target


def table(results: dict[str, Any]) -> str:
    """Medians over the rounds, and the ratio of each line to the one before it."""
    lines = [
        f"{results['model']} on {results['machine'].get('cpu', 'this CPU')}, {results['machine'].get('cores', '?')} cores; "
        f"medians of {results['rounds']} interleaved round(s); `{results['command']}`.",
        "",
    ]
    for figure, title in FIGURES.items():
        lines += [f"| {title} | {' | '.join(f'{w} | step' for w in WORKLOADS)} |", "|---" * (1 + 2 * len(WORKLOADS)) + "|"]
        before: dict[str, float] = {}
        for variant in VARIANTS:
            cells = []
            for workload in WORKLOADS:
                value = median(results, workload, variant, figure)
                cells += [f"{value:,.0f}", f"{value / before[workload]:.2f}x" if workload in before else ""]
                before[workload] = value
            lines.append(f"| {variant} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def fill(page: str, content: str) -> str:
    """The page with what stands between its markers replaced."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + content + END + rest.partition(END)[2]


def median(results: dict[str, Any], workload: str, variant: str, figure: str) -> float:
    found = [run["result"][figure] for run in results["runs"] if (run["workload"], run["variant"]) == (workload, variant)]
    return float(statistics.median(found))


if __name__ == "__main__":
    main()
