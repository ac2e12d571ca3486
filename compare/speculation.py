"""`python -m compare.speculation WHAT`: what guessing ahead is worth, in parts that take a few minutes each.

    texts      plain and every proposer at batch 1: code to edit, a source to quote, open chat
    batches    open chat at batch 1 to 32, where drafts stop paying and must switch themselves off
    peers      vLLM's and llama.cpp's n-gram speculation on the same prompts
    forced     a 7B shape with a small drafter, as a function of how often drafts are right
    page       the tables of docs/speculative.md, from the newest file of each part

minfer's engines live in this one process and take turns, A B C, C B A, with warm weights and as much KV memory each. Two engines alike
differ by a tenth, as their memory happens to lie, so "against plain" compares an engine with itself: each answer is given twice, with
and without drafts, and the ratio is the median over rounds. Speeds are medians of tokens per second from the first token to the last.
Outputs must be the same in every variant, or it stops. Each part writes
`results/speculation-WHAT-<date>-<host>.json`. A trained head takes part with `--head DIR` (`minfer train-draft smollm2-135m --out DIR`).
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

from compare import machine, speculation_forced, speculation_peers
from compare.ablation import ROOT, fill
from minfer import LLM, SamplingParams

PAGE = ROOT / "docs" / "speculative.md"
PARTS = ("texts", "batches", "peers", "forced")
BATCHES = (1, 2, 4, 8, 16, 32)
TOKENS = 160

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
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m compare.speculation", description=__doc__, formatter_class=plain)
    parser.add_argument("what", choices=[*PARTS, "page"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--head", type=Path, help="a drafting head trained for the model")
    parser.add_argument("--rounds", type=int, default=5, help="times that everything is timed")
    parser.add_argument("--target", default="llama2-7b", help="forced: the shape that is drafted for")
    parser.add_argument("--drafter", default="tinyllama-1.1b", help="forced: the shape that drafts")
    options = parser.parse_args()
    if options.what != "page":
        facts = {"machine": machine.describe(), "rounds": options.rounds, "command": _command(options)}
        target = ROOT / "results" / f"speculation-{options.what}-{time.strftime('%Y-%m-%d')}-{socket.gethostname()}.json"
        target.write_text(json.dumps({**facts, **_measure(options)}, indent=1) + "\n")
        print(target)
    PAGE.write_text(fill(PAGE.read_text(), tables()))


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    if options.what == "texts":
        return {"model": options.model, "runs": measure(options, [(kind, 1) for kind in TEXTS], variants(options.head, skip=True))}
    if options.what == "batches":
        return {"model": options.model, "runs": measure(options, [("open chat", batch) for batch in BATCHES], variants(options.head))}
    if options.what == "peers":
        tokenizer = LLM(options.model, max_model_len=256, kv_cache_memory=2**24).get_tokenizer()
        prompts = {kind: tokenizer.apply_chat_template([{"role": "user", "content": text}]) for kind, text in TEXTS.items()}
        runs = [run for peer in speculation_peers.PEERS for run in speculation_peers.measure(peer, prompts, TOKENS, options.rounds, 8)]
        return {"runs": runs}
    forced = {"target": options.target, "drafter": options.drafter, "quant": "int4", "drafts": 4}
    return {**forced, "runs": speculation_forced.measure(options.target, options.drafter, "int4", 4, 32, min(options.rounds, 3))}


def variants(head: Path | None, *, skip: bool = False) -> dict[str, dict[str, Any]]:
    """What takes part: the settings of each variant, `plain` first."""
    found: dict[str, dict[str, Any]] = {"plain": {}, "ngram": {"speculative": "ngram"}}
    if skip:
        found["ngram, always 8 drafts"] = {"speculative": "ngram", "adaptive_drafts": False}
        found["skip"] = {"speculative": "skip", "num_draft_tokens": 4}
    if head is not None:
        kind = json.loads((head / "config.json").read_text()).get("architectures", ["head"])[0]
        name = "EAGLE-3 head" if "Eagle3" in kind else f"{kind} head"
        found[name] = {"speculative": "draft", "draft_model": str(head), "num_draft_tokens": 4}
    return found


def measure(options: argparse.Namespace, cases: list[tuple[str, int]], chosen: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every variant's answer to every (text, batch), in turns; the first round warms up."""
    sizes: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 32, "kv_cache_memory": 2**30}
    engines = {name: LLM(options.model, **sizes, **settings) for name, settings in chosen.items()}
    runs: list[dict[str, Any]] = []
    for number in range(options.rounds + 1):
        for kind, batch in cases:
            print(f"round {number} of {options.rounds}: {kind}, batch {batch}", file=sys.stderr)
            turn = list(engines.items())[:: 1 if number % 2 else -1]
            answers = {name: both(llm, kind, batch, drafts_first=number % 2 == 0) for name, llm in turn}
            if any(result["tokens"] != answers["plain"]["tokens"] for result in answers.values()):
                raise SystemExit(f"{kind} at batch {batch}: speculation changed the output")
            if number:
                runs += [{"text": kind, "batch": batch, "variant": name, **answers[name]} for name in engines]
    for run in runs:
        del run["tokens"]
    return runs


def both(llm: LLM, kind: str, batch: int, *, drafts_first: bool) -> dict[str, Any]:
    """The engine's answer with its drafts, and how fast it is without them. With them first where prompts are new: a head's own KV of a
    prompt must not be missing from the prefix cache.
    """
    speculation = llm.engine.core.speculation
    if speculation is None:
        return answer(llm, kind, batch)
    found: dict[str, Any] = {}
    for drafting in (drafts_first, not drafts_first):
        llm.engine.core.speculation = speculation if drafting else None
        result = answer(llm, kind, batch)
        found |= result if drafting else {"plain_tokens_per_s": result["decode_tokens_per_s"]}
    llm.engine.core.speculation = speculation
    return found


def answer(llm: LLM, kind: str, batch: int) -> dict[str, Any]:
    """Greedy answers to `batch` copies of the text, told apart by a number so that they are not one request in the cache."""
    chats = [[{"role": "user", "content": f"{TEXTS[kind]}" + (f" ({copy})" if batch > 1 else "")}] for copy in range(batch)]
    speculation = llm.engine.core.speculation
    before = speculation.stats.snapshot() if speculation is not None else None
    depths = list(speculation.stats.accepted_at) if speculation is not None else []
    started = time.perf_counter()
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
    wall = time.perf_counter() - started
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    first = max(output.metrics.first_token_time or 0.0 for output in outputs)
    last = max(output.metrics.last_token_time or 0.0 for output in outputs)
    result: dict[str, Any] = {"tokens": tokens, "seconds": wall, "output_tokens": sum(map(len, tokens))}
    result["decode_tokens_per_s"] = (result["output_tokens"] - batch) / (last - first)
    if speculation is not None and before is not None:
        now = speculation.stats.snapshot()
        result["drafts"] = {name: now[name] - before[name] for name in now}
        result["accepted_at"] = [count - old for count, old in zip(speculation.stats.accepted_at, depths, strict=True)]
    return result


def tables() -> str:
    """All parts that have been measured."""
    parts = []
    for part, show in (
        ("texts", texts_table),
        ("batches", batches_table),
        ("peers", speculation_peers.table),
        ("forced", speculation_forced.table),
    ):
        files = sorted((ROOT / "results").glob(f"speculation-{part}-*.json"), key=lambda file: file.name)
        if files:
            parts.append(show(json.loads(files[-1].read_text())))
    return "\n".join(parts)


def texts_table(results: dict[str, Any]) -> str:
    lines = [
        _heading(results),
        "",
        "| text, batch 1 | variant | tokens/s | against plain | tokens a step | drafts right at depth 1, 2, ... |",
        "|---|---|---|---|---|---|",
    ]
    for kind in TEXTS:
        for name in dict.fromkeys(run["variant"] for run in results["runs"]):
            run = next(run for run in results["runs"] if (run["text"], run["variant"]) == (kind, name))
            now, ratio = speed(results, kind, 1, name), against_plain(results, kind, 1, name)
            lines.append(f"| {kind} | {name} | {now:,.0f} | {ratio:.2f}x | {_acceptance(run)} |")
    return "\n".join(lines) + "\n"


def _acceptance(run: dict[str, Any]) -> str:
    drafts = run.get("drafts")
    if not drafts or not drafts["drafts"]:
        return "1.0 | no drafts"
    shares = [count / drafts["drafts"] for count in run["accepted_at"]]
    return f"{run['output_tokens'] / (run['output_tokens'] - drafts['accepted_tokens']):.1f} | {', '.join(f'{s:.0%}' for s in shares[:4])}"


def batches_table(results: dict[str, Any]) -> str:
    names = list(dict.fromkeys(run["variant"] for run in results["runs"]))
    lines = [
        _heading(results),
        "",
        "| open chat, batch | " + " | ".join(f"{name}, tokens/s" for name in names) + " | worst against plain |",
        "|---" * (len(names) + 2) + "|",
    ]
    for batch in BATCHES:
        speeds = [speed(results, "open chat", batch, name) for name in names]
        worst = min(against_plain(results, "open chat", batch, name) for name in names[1:])
        lines.append(f"| {batch} | {' | '.join(f'{s:,.0f}' for s in speeds)} | {worst:.2f}x |")
    return "\n".join(lines) + "\n"


def speed(results: dict[str, Any], kind: str, batch: int, variant: str) -> float:
    return float(statistics.median(run["decode_tokens_per_s"] for run in _chosen(results, kind, batch, variant)))


def against_plain(results: dict[str, Any], kind: str, batch: int, variant: str) -> float:
    """The median of the rounds' ratios of the engine with drafts to itself without."""
    runs = _chosen(results, kind, batch, variant)
    return float(statistics.median(run["decode_tokens_per_s"] / run.get("plain_tokens_per_s", run["decode_tokens_per_s"]) for run in runs))


def _chosen(results: dict[str, Any], kind: str, batch: int, variant: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if (run["text"], run["batch"], run["variant"]) == (kind, batch, variant)]


def _heading(results: dict[str, Any]) -> str:
    cpu = results["machine"].get("cpu", "this CPU")
    cores = results["machine"].get("cores", "?")
    return f"{results['model']} on {cpu}, {cores} cores; medians of {results['rounds']} interleaved rounds; `{results['command']}`."


def _command(options: argparse.Namespace) -> str:
    head = " --head DIR" if options.head else ""
    return f"python -m compare.speculation {options.what}{head} --rounds {options.rounds}"


if __name__ == "__main__":
    main()
