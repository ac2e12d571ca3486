"""`python -m compare.kv_cache --text FILE`: what each type of KV cache costs in quality and gives in capacity and speed.

Quality is `minfer perplexity` on the text, every key and value of which goes through the cache; speed is `minfer bench` at batch 1,
where a step reads the whole context. Each run is a process of its own; speeds go round by round, A B C ... A B C. Writes
`results/kv-cache-<date>-<host>.json` and the tables of `docs/kv-cache.md`, which are made from that file alone (`--from FILE`).
"""

from __future__ import annotations

import argparse
import hashlib
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
from compare.ablation import ROOT, fill

PAGE = ROOT / "docs" / "kv-cache.md"
TYPES = ("bf16", "fp8", "fp8_e5m2", "int8", "int4")
TIMED = ("bf16", "fp8", "int8", "int4")
CONTEXTS = (512, 4096, 8128)
OUTPUT_TOKENS = 32
WINDOW = 1024


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.kv_cache", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="the text that perplexity is measured on")
    parser.add_argument("--windows", type=int, default=24, help=f"windows of {WINDOW} tokens of it")
    parser.add_argument("--rounds", type=int, default=1, help="runs of every speed")
    parser.add_argument("--part", choices=("all", "quality", "speed"), default="all", help="measure one part and keep the file's other")
    parser.add_argument("--from", dest="source", type=Path, help="make the page from an earlier run's file")
    options = parser.parse_args()
    if options.source is None and options.part != "speed" and options.text is None:
        parser.error("--text FILE is needed to measure quality")
    source = options.source or measure(options)
    results = json.loads(source.read_text())
    if "quality" not in results:
        print(f"{source} has speeds only; measure the quality for the page")
        return
    PAGE.write_text(fill(PAGE.read_text(), tables(results)))
    print(f"{source} -> {PAGE}")


def measure(options: argparse.Namespace) -> Path:
    target = ROOT / "results" / f"kv-cache-{time.strftime('%Y-%m-%d')}-{socket.gethostname()}.json"
    results: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    results |= {"machine": machine.describe(), "model": options.model, "versions": versions(), "capacity": capacity(options.model)}
    if options.part != "speed":
        text = options.text.read_bytes()
        results["quality"] = {
            "text": {"name": options.text.name, "sha256": hashlib.sha256(text).hexdigest()},
            "command": f"python -m compare.kv_cache --text FILE --windows {options.windows} --part quality",
            "runs": [perplexity(options.model, options.text, options.windows, kind) for kind in TYPES],
        }
    if options.part != "quality":
        results["speed"] = {
            "rounds": options.rounds,
            "command": f"python -m compare.kv_cache --rounds {options.rounds} --part speed",
            "runs": [speed(options.model, c, kind) for _ in range(options.rounds) for c in CONTEXTS for kind in TIMED],
        }
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=1) + "\n")
    return target


def versions() -> dict[str, str]:
    packages: dict[str, str] = run("env")["packages"]
    return {name: packages[name] for name in ("torch", "numpy") if name in packages}


def capacity(model: str) -> dict[str, int]:
    """Tokens that fit into a GiB, as `minfer inspect` says."""
    found: dict[str, int] = run(f"inspect {model} --kv-cache-memory 1G")["kv_tokens_by_dtype"]
    return found


def perplexity(model: str, text: Path, windows: int, kind: str) -> dict[str, Any]:
    switches = f"--quant none --window {WINDOW} --max-windows {windows} --max-model-len {2 * WINDOW}"
    switches += f" --kv-cache-memory 512M --kv-cache-dtype {kind}"
    result = run(f"perplexity {model} {shlex.quote(str(text))} {switches}")
    return {"type": kind, "command": f"minfer perplexity {model} FILE {switches}", "result": result}


def speed(model: str, context: int, kind: str) -> dict[str, Any]:
    shape = f"--prompt-tokens {context} --output-tokens {OUTPUT_TOKENS} --repeats 1 --warmup 0"
    command = f"bench {model} {shape} --kv-cache-memory 512M --kv-cache-dtype {kind}"
    return {"type": kind, "context": context, "command": f"minfer {command}", "result": run(command)}


def run(command: str) -> dict[str, Any]:
    print(f"minfer {command}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", "minfer", *shlex.split(command), "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`minfer {command}` failed: {done.stderr.strip() or done.stdout.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def tables(results: dict[str, Any]) -> str:
    """Quality and capacity by type, and speed by type and context where it was measured."""
    quality, timed, fits = results["quality"], results.get("speed"), results["capacity"]
    scores = {run["type"]: run["result"] for run in quality["runs"]}
    base, tokens = scores["bf16"]["perplexity"], scores["bf16"]["tokens"]
    where = f"{results['machine'].get('cpu', 'this CPU')}, {results['machine'].get('cores', '?')} cores"
    lines = [
        f"{results['model']}, bfloat16 weights; perplexity of {tokens:,} predictions of {quality['text']['name']}; `{quality['command']}`.",
        "",
        "| type | perplexity | against bf16 | tokens in a GiB | against bf16 |",
        "|---|---|---|---|---|",
    ]
    for kind, score in scores.items():
        change = f"{100 * (score['perplexity'] / base - 1):+.2f}%"
        lines.append(f"| {kind} | {score['perplexity']:.3f} | {change} | {fits[kind]:,} | {fits[kind] / fits['bf16']:.2f}x |")
    if timed is None:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        f"{results['model']} as it is in its file (4 bits) on {where}; batch 1, {OUTPUT_TOKENS} tokens after the prompt; medians of "
        f"{timed['rounds']} round(s); `{timed['command']}`.",
        "",
        f"| tokens/s | {' | '.join(f'decode at {c:,} | prefill of {c:,}' for c in CONTEXTS)} |",
        "|---" * (1 + 2 * len(CONTEXTS)) + "|",
    ]
    for kind in TIMED:
        cells = [median(timed, kind, c, f"{phase}_tokens_per_s") for c in CONTEXTS for phase in ("decode", "prefill")]
        lines.append(f"| {kind} | {' | '.join(f'{value:,.0f}' for value in cells)} |")
    return "\n".join(lines) + "\n"


def median(timed: dict[str, Any], kind: str, context: int, figure: str) -> float:
    return float(statistics.median(run["result"][figure] for run in timed["runs"] if (run["type"], run["context"]) == (kind, context)))


if __name__ == "__main__":
    main()
