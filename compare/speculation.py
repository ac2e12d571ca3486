"""`python -m compare.speculation`: decoding with and without speculation, on texts that suit it and on one that doesn't.

Three kinds of text at batch 1 (code to edit, a source to quote, open chat) and open chat at growing batch sizes, where
drafts stop paying. All engines live in this one process and take turns, A B C ... A B C, each with warm weights; figures are medians
over rounds of tokens per second from the first token to the last. Outputs must be the same in every variant, or it stops.
Writes `results/speculation-<date>-<host>.json` and the tables of `docs/speculative.md`, which are made from that file alone.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from compare import machine
from compare.ablation import ROOT, fill
from minfer import LLM, SamplingParams

PAGE = ROOT / "docs" / "speculative.md"
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ngram": {"speculative": "ngram"},
    "ngram, always 8 drafts": {"speculative": "ngram", "adaptive_drafts": False},
}
BATCHES = (1, 2, 4, 8, 16, 32)

CODE = """def read_config(path):
    with open(path) as handle:
        data = json.load(handle)
    result = {}
    for key, value in data.items():
        if key.startswith("_"):
            continue
        result[key] = value
    return result


def write_config(path, data):
    with open(path, "w") as handle:
        json.dump(data, handle, indent=2)
"""
NEWS = (
    "The city council met on Monday to discuss the new bridge. The mayor said that the bridge would cost forty million dollars and take "
    "three years to build. Several residents asked why the old bridge could not be repaired instead. An engineer explained that the old "
    "bridge was built in 1931 and that its steel had been weakened by rust. The council voted seven to two in favour of the new bridge. "
    "Work will begin in the spring of next year."
)
TEXTS: dict[str, str] = {
    "code edit": f"Rewrite this Python code, renaming the variable `data` to `settings` and keeping the rest:\n\n```python\n{CODE}```",
    "quoting": f"Read the text and repeat the most important sentences word for word.\n\nText: {NEWS}",
    "open chat": "What should I think about before I adopt a dog?",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.speculation", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5, help="times that every variant answers every text")
    parser.add_argument("--from", dest="source", type=Path, help="make the page from an earlier run's file")
    options = parser.parse_args()
    source = options.source or measure(options.model, options.rounds)
    PAGE.write_text(fill(PAGE.read_text(), tables(json.loads(source.read_text()))))
    print(f"{source} -> {PAGE}")


def measure(model: str, rounds: int) -> Path:
    engines = {name: LLM(model, max_model_len=2048, **settings) for name, settings in VARIANTS.items()}
    cases = [(kind, 1) for kind in TEXTS] + [("open chat", batch) for batch in BATCHES[1:]]
    runs: list[dict[str, Any]] = []
    for number in range(rounds + 1):  # the first round warms up
        for kind, batch in cases:
            print(f"round {number} of {rounds}: {kind}, batch {batch}", file=sys.stderr)
            answers = {name: answer(llm, kind, batch) for name, llm in engines.items()}
            if any(result["tokens"] != answers["plain"]["tokens"] for result in answers.values()):
                raise SystemExit(f"{kind} at batch {batch}: speculation changed the output")
            if number:
                runs += [{"text": kind, "batch": batch, "variant": name, **result} for name, result in answers.items()]
    for run in runs:
        del run["tokens"]
    target = ROOT / "results" / f"speculation-{time.strftime('%Y-%m-%d')}-{socket.gethostname()}.json"
    facts = {"machine": machine.describe(), "model": model, "rounds": rounds, "command": f"python -m compare.speculation --rounds {rounds}"}
    target.write_text(json.dumps({**facts, "runs": runs}, indent=1) + "\n")
    return target


def answer(llm: LLM, kind: str, batch: int) -> dict[str, Any]:
    """Greedy answers to `batch` copies of the text, told apart by a number so that they are not one request in the cache."""
    chats = [[{"role": "user", "content": f"{TEXTS[kind]}" + (f" ({copy})" if batch > 1 else "")}] for copy in range(batch)]
    speculation = llm.engine.core.speculation
    before = speculation.stats.snapshot() if speculation is not None else None
    started = time.perf_counter()
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=160), use_tqdm=False)
    wall = time.perf_counter() - started
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    first = max(output.metrics.first_token_time or 0.0 for output in outputs)
    last = max(output.metrics.last_token_time or 0.0 for output in outputs)
    result: dict[str, Any] = {"tokens": tokens, "seconds": wall, "output_tokens": sum(map(len, tokens))}
    result["decode_tokens_per_s"] = (result["output_tokens"] - batch) / (last - first)
    if speculation is not None and before is not None:
        now = speculation.stats.snapshot()
        result["drafts"] = {name: now[name] - before[name] for name in now}
    return result


def tables(results: dict[str, Any]) -> str:
    cpu = results["machine"].get("cpu", "this CPU")
    lines = [
        f"{results['model']} on {cpu}, {results['machine'].get('cores', '?')} cores; medians of {results['rounds']} interleaved rounds; "
        f"`{results['command']}`.",
        "",
        "| text, batch 1 | " + " | ".join(f"{name}, tok/s" for name in VARIANTS) + " | speed-up | tokens kept of drafted | tokens a step |",
        "|---" * (len(VARIANTS) + 4) + "|",
    ]
    for kind in TEXTS:
        speeds = [speed(results, kind, 1, name) for name in VARIANTS]
        drafts = next(run["drafts"] for run in results["runs"] if (run["text"], run["batch"], run["variant"]) == (kind, 1, "ngram"))
        kept = f"{drafts['accepted_tokens']} of {drafts['draft_tokens']}"
        length = 1 + drafts["accepted_tokens"] / max(1, drafts["drafts"])
        lines.append(f"| {kind} | {' | '.join(f'{s:,.0f}' for s in speeds)} | {speeds[1] / speeds[0]:.2f}x | {kept} | {length:.1f} |")
    lines += [
        "",
        "| open chat, batch | " + " | ".join(f"{name}, tok/s" for name in VARIANTS) + " | ngram / plain |",
        "|---" * (len(VARIANTS) + 2) + "|",
    ]
    for batch in BATCHES:
        speeds = [speed(results, "open chat", batch, name) for name in VARIANTS]
        lines.append(f"| {batch} | {' | '.join(f'{s:,.0f}' for s in speeds)} | {speeds[1] / speeds[0]:.2f}x |")
    return "\n".join(lines) + "\n"


def speed(results: dict[str, Any], kind: str, batch: int, variant: str) -> float:
    runs = results["runs"]
    found = [run["decode_tokens_per_s"] for run in runs if (run["text"], run["batch"], run["variant"]) == (kind, batch, variant)]
    return float(statistics.median(found))


if __name__ == "__main__":
    main()
