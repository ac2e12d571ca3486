"""`python -m compare.speculation WHAT`: what guessing ahead is worth, in parts that take a few minutes each.

    texts      plain and every proposer at batch 1: code to edit, a source to quote, open chat
    batches    open chat at batch 1 to 32, where drafts stop paying and must switch themselves off; `--sizes 1,2` for some of them
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
import math
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare import machine, speculation_batches, speculation_forced, speculation_peers
from compare.ablation import ROOT, fill
from compare.measure import Spread
from minfer import LLM, SamplingParams

PAGE = ROOT / "docs" / "speculative.md"
PARTS = ("texts", "batches", "peers", "forced")
BATCHES = (1, 2, 4, 8, 16, 32)
TOKENS = 160
PAIRS = 4  # at batch 1 in one round

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
    parser.add_argument("--sizes", default=",".join(map(str, BATCHES)), help="batches: which ones")
    parser.add_argument("--append", action="store_true", help="add to the newest file of this part")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end after so long, with what there is")
    parser.add_argument("--target", default="llama2-7b", help="forced: the shape that is drafted for")
    parser.add_argument("--drafter", default="tinyllama-1.1b", help="forced: the shape that drafts")
    options = parser.parse_args()
    if options.head is not None and not (options.head / "config.json").is_file():
        parser.error(f"--head {options.head} holds no config.json; `minfer train-draft` makes a head")
    if not all(size.isdecimal() and int(size) > 0 for size in options.sizes.split(",")):
        parser.error(f"--sizes takes numbers of sequences like 1,8,32, not {options.sizes!r}")
    if options.what != "page":
        _keep(options, time.monotonic() + options.seconds)
    PAGE.write_text(fill(PAGE.read_text(), tables()))


def _keep(options: argparse.Namespace, end: float) -> None:
    """Measures, and writes down what there is whenever there is more."""
    target = newest(options.what) if options.append else None
    if target is None:
        target = ROOT / "results" / f"speculation-{options.what}-{time.strftime('%Y-%m-%d')}-{socket.gethostname()}.json"
        results = {"machine": machine.describe(), "command": _command(options), **_subject(options), "runs": []}
    else:
        results = json.loads(target.read_text())
    for runs in _measure(options):
        results["runs"] += runs
        target.write_text(json.dumps(results, indent=1) + "\n")
        if time.monotonic() > end:
            break
    print(target)


def _subject(options: argparse.Namespace) -> dict[str, Any]:
    if options.what == "forced":
        return {"target": options.target, "drafter": options.drafter, "quant": "int4", "drafts": 4}
    return {} if options.what == "peers" else {"model": options.model}


def _measure(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Runs, a case at a time."""
    if options.what == "texts":
        yield from measure(options, [(kind, 1) for kind in TEXTS], variants(options.head, skip=True))
    elif options.what == "batches":
        yield from measure_batches(options, [int(size) for size in options.sizes.split(",")])
    elif options.what == "peers":
        tokenizer = LLM(options.model, max_model_len=256, kv_cache_memory=2**24).get_tokenizer()
        prompts = {kind: tokenizer.apply_chat_template([{"role": "user", "content": text}]) for kind, text in TEXTS.items()}
        for peer in speculation_peers.PEERS:
            yield speculation_peers.measure(peer, prompts, TOKENS, options.rounds, 8)
    else:
        yield from speculation_forced.measure(options.target, options.drafter, "int4", 4, 24, options.rounds)


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
        if skip:
            found[f"ngram, else {name}"] = {"speculative": "ngram+draft", "draft_model": str(head)}
    return found


def measure(options: argparse.Namespace, cases: list[tuple[str, int]], chosen: dict[str, dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Every variant's answers to every (text, batch), in turns; the first round warms up. Short ones are asked for more often."""
    sizes: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 32, "kv_cache_memory": 2**30}
    engines = {name: LLM(options.model, **sizes, **settings) for name, settings in chosen.items()}
    for number in range(options.rounds + 1):
        for kind, batch in cases:
            print(f"round {number} of {options.rounds}: {kind}, batch {batch}", file=sys.stderr)
            runs: list[dict[str, Any]] = []
            for pair in range(max(1, PAIRS // batch) if number else 1):
                turn = list(engines.items())[:: 1 if (number + pair) % 2 else -1]
                answers = {name: both(llm, kind, batch, drafts_first=(number + pair) % 2 == 0) for name, llm in turn}
                first = next(iter(answers.values()))["tokens"]
                if any(result.pop("tokens") != first for result in answers.values()):
                    raise SystemExit(f"{kind} at batch {batch}: speculation changed the output")
                runs += [{"text": kind, "batch": batch, "variant": name, **answers[name]} for name in engines]
            if number:
                yield runs


def measure_batches(options: argparse.Namespace, sizes: list[int]) -> Iterator[list[dict[str, Any]]]:
    """Answers of both engines with drafts on and off in turns; the first round warms up."""
    chosen = {name: settings for name, settings in variants(options.head).items() if settings}
    limits: dict[str, Any] = {"max_model_len": 2048, "max_num_seqs": 32, "kv_cache_memory": 2**30}
    engines = {name: LLM(options.model, **limits, **settings) for name, settings in chosen.items()}
    for number in range(options.rounds + 1):
        for batch in sizes:
            print(f"round {number} of {options.rounds}: batch {batch}", file=sys.stderr)
            chats = [_chat("open chat", copy if batch > 1 else None) for copy in range(batch)]
            said = []
            for name, llm in list(engines.items())[:: 1 if number % 2 else -1]:
                tokens, pairs = speculation_batches.answer(llm, chats, drafts_first=number % 2 == 0)
                said.append(tokens)
                if number:
                    yield [{"batch": batch, "variant": name, "pairs": pairs}]
            if any(tokens != said[0] for tokens in said):
                raise SystemExit(f"batch {batch}: speculation changed the output")


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
        if found and found["tokens"] != result["tokens"]:
            raise SystemExit(f"{kind} at batch {batch}: speculation changed the output")
        plain = {"tokens": result["tokens"], "plain_tokens_per_s": result["decode_tokens_per_s"]}
        found = {**found, **result} if drafting else {**found, **plain}
    llm.engine.core.speculation = speculation
    return found


def answer(llm: LLM, kind: str, batch: int) -> dict[str, Any]:
    """Greedy answers to `batch` copies of the text, told apart by a number so that they are not one request in the cache."""
    chats = [_chat(kind, copy if batch > 1 else None) for copy in range(batch)]
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


def newest(part: str) -> Path | None:
    """Its last file."""
    return max((ROOT / "results").glob(f"speculation-{part}-*.json"), key=lambda file: file.name, default=None)


def _chat(kind: str, copy: int | None) -> list[dict[str, str]]:
    return [{"role": "user", "content": TEXTS[kind] + ("" if copy is None else f" ({copy})")}]


def tables() -> str:
    """All parts that have been measured."""
    parts = []
    for part, show in (
        ("heads", heads_table),
        ("texts", texts_table),
        ("batches", batches_table),
        ("peers", speculation_peers.table),
        ("forced", speculation_forced.table),
    ):
        file = newest(part)
        if file is not None:
            parts.append(show(json.loads(file.read_text())))
    return "\n".join(parts)


def heads_table(results: dict[str, Any]) -> str:
    """Of the trainings that led to the head of the other tables: nothing here measures them, each is what its command printed."""
    lines = [
        f"Trainings of a head for {results['model']}, each from the one before; the last is the head below.",
        "",
        "| training | held-out drafts right to depth 1, 2, ... |",
        "|---|---|",
    ]
    for run in results["runs"]:
        lines.append(f"| `{run['command']}` | {', '.join(f'{share:.0%}' for share in run['held_out_acceptance'])} |")
    return "\n".join(lines) + "\n"


def texts_table(results: dict[str, Any]) -> str:
    lines = [
        _heading(results),
        "",
        "| text, batch 1 | variant | tokens/s | against plain | tokens a step | drafts right at depth 1, 2, ... |",
        "|---|---|---|---|---|---|",
    ]
    for kind in TEXTS:
        for name in dict.fromkeys(run["variant"] for run in results["runs"]):
            runs = _chosen(results, kind, 1, name)
            now, ratio = speed(results, kind, 1, name), against_plain(results, kind, 1, name)
            lines.append(f"| {kind} | {name} | {now:,.0f} | {_interval(ratio)} | {_acceptance(runs)} |")
    return "\n".join(lines) + "\n"


def _acceptance(runs: list[dict[str, Any]]) -> str:
    """Of all answers together: what is drafted depends on the clock."""
    made = sum(run["drafts"]["drafts"] for run in runs if run.get("drafts"))
    if not made:
        return "1.0 | no drafts"
    accepted, said = sum(run["drafts"]["accepted_tokens"] for run in runs), sum(run["output_tokens"] for run in runs)
    depths = zip(*(run["accepted_at"] for run in runs), strict=True)
    return f"{said / (said - accepted):.1f} | {', '.join(f'{sum(counts) / made:.0%}' for counts in list(depths)[:4])}"


def batches_table(results: dict[str, Any]) -> str:
    cpu, cores = results["machine"].get("cpu", "this CPU"), results["machine"].get("cores", "?")
    turns = f"drafts on and off in turns of {speculation_batches.BLOCK} steps"
    heading = f"{results['model']} on {cpu}, {cores} cores; {turns}; `{results['command']}`."
    return speculation_batches.table(results, heading)


def _interval(ratio: Spread) -> str:
    return f"{ratio.median:.2f}x" + (f" ({ratio.low:.2f} to {ratio.high:.2f})" if ratio.n > 1 else "")


def speed(results: dict[str, Any], kind: str, batch: int, variant: str) -> float:
    return float(statistics.median(run["decode_tokens_per_s"] for run in _chosen(results, kind, batch, variant)))


def against_plain(results: dict[str, Any], kind: str, batch: int, variant: str) -> Spread:
    """The ratios of the engine with drafts to itself without."""
    runs = _chosen(results, kind, batch, variant)
    return Spread.of([run["decode_tokens_per_s"] / run.get("plain_tokens_per_s", run["decode_tokens_per_s"]) for run in runs])


def _chosen(results: dict[str, Any], kind: str, batch: int, variant: str) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if (run["text"], run["batch"], run["variant"]) == (kind, batch, variant)]


def _heading(results: dict[str, Any]) -> str:
    cpu = results["machine"].get("cpu", "this CPU")
    cores = results["machine"].get("cores", "?")
    counts = Counter((run["text"], run["batch"], run["variant"]) for run in results["runs"]).values()
    times = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"{results['model']} on {cpu}, {cores} cores; medians of {times} interleaved answers; `{results['command']}`."


def _command(options: argparse.Namespace) -> str:
    head = " --head DIR" if options.head else ""
    return f"python -m compare.speculation {options.what}{head}"


if __name__ == "__main__":
    main()
