"""`python -m compare.structured coverage|cost SCHEMAS.jsonl`: how much of JSON Schema minfer can promise, and what the promise costs.

coverage: each line of the file holds an object with a `schema` (and, if it likes, `split` and `name`). Every schema that compiles is
answered by the model, greedily, and what comes out is checked with `jsonschema`, an implementation that shares nothing with the one that
made the grammar. So there are four endings: refused (a 400 in the server), valid, cut by `--max-tokens`, and invalid, of which there
must be none.

cost: how long each schema takes to compile; then the same prompts and lengths with and without their form, at batch 1 and several at a
time, in turns: milliseconds for each token, and what of them went into masks. Only this part needs a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
from jsonschema.validators import validator_for  # type: ignore[import-untyped]

from compare import machine
from minfer import LLM, SamplingParams, StructuredOutputsParams
from minfer.errors import RequestError

PAIRS = (("one token a step", "plain"), ("forced together", "one token a step"))  # what is compared with what, within a round
ENDINGS = ("valid", "cut", "refused", "invalid")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.structured", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("coverage", "cost"))
    parser.add_argument("schemas", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=0, help="schemas to take, spread evenly over the file (default: all)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="cost: requests at a time, beside one")
    parser.add_argument("--repeats", type=int, default=3, help="cost: rounds of each arm, in turns")
    parser.add_argument("--out", type=Path, help="write the results as JSON to this file")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.schemas.read_text().splitlines() if line.strip()]
    if args.limit and args.what == "coverage":
        lines = spread(lines, args.limit)
    sizes = f"--limit {args.limit or len(lines)} --max-tokens {args.max_tokens}"
    more = f" --batch {args.batch} --repeats {args.repeats}" if args.what == "cost" else ""
    result = {
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("minfer", "llguidance", "jsonschema", "torch")},
        "command": f"python -m compare.structured {args.what} SCHEMAS.jsonl {sizes}{more}",
        "model": args.model,
        **(coverage(args, lines) if args.what == "coverage" else cost(args, lines)),
    }
    print(table(result["summary"]) if args.what == "coverage" else cost_table(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def spread(lines: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of them, from all over the file."""
    return [lines[index * len(lines) // count] for index in range(min(count, len(lines)))]


def coverage(args: argparse.Namespace, lines: list[dict[str, Any]]) -> dict[str, Any]:
    llm = LLM(args.model, max_model_len=2048)
    llm.engine.inputs.grammars.compile(StructuredOutputsParams(choice=["a"]))  # makes the vocabulary's tables, once for all grammars
    runs = [run(llm, line, args.max_tokens) for line in lines]
    return {"summary": summary(runs), "runs": runs}


def cost(args: argparse.Namespace, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Arms: no form, a form one token a step, a form with forced tokens together."""
    engines = {name: LLM(args.model, max_model_len=1024, forced_tokens=name) for name in ("off", "on")}
    for llm in engines.values():
        llm.engine.inputs.grammars.compile(StructuredOutputsParams(choice=["a"]))  # makes the vocabulary's tables, once for all grammars
    compiled = sorted(_compile_ms(engines["off"], line["schema"]) for line in lines)
    chosen = spread(lines, args.limit) if args.limit else lines
    asks = [(_message(line["schema"])["content"][:600], StructuredOutputsParams(json=line["schema"])) for line in chosen]
    asks = [ask for ask in asks if all(_compiles(llm, ask[1]) for llm in engines.values())]  # what is refused has no cost
    arms = {"plain": ("off", False), "one token a step": ("off", True), "forced together": ("on", True)}
    runs: dict[str, list[dict[str, float]]] = {f"{arm}, batch {size}": [] for size in (1, args.batch) for arm in arms}
    for _ in range(args.repeats):
        for size in (1, args.batch):
            for arm, (engine, formed) in arms.items():
                runs[f"{arm}, batch {size}"].append(timed(engines[engine], asks, formed, size, args.max_tokens))
    medians = {name: {key: round(statistics.median(r[key] for r in each), 4) for key in each[0]} for name, each in runs.items()}
    ratios = {f"{arm}, batch {size}": _ratio(runs, arm, base, size) for size in (1, args.batch) for arm, base in PAIRS}
    values = {"schemas": len(asks), "medians": medians, "ratios": ratios, "runs": runs}
    return {"compile_ms": {"schemas": len(compiled), "median": compiled[len(compiled) // 2], "most": compiled[-1]}, **values}


def _compile_ms(llm: LLM, schema: dict[str, Any]) -> float:
    started = time.perf_counter()
    _compiles(llm, StructuredOutputsParams(json=schema))
    return round((time.perf_counter() - started) * 1e3, 2)


def _compiles(llm: LLM, form: StructuredOutputsParams) -> bool:
    try:
        llm.engine.inputs.grammars.compile(form)
    except RequestError:
        return False
    return True


def _ratio(runs: dict[str, list[dict[str, float]]], arm: str, base: str, size: int) -> list[float]:
    """(median, least, most) of an arm's time for each token over that of `base` in the same round."""
    pairs = zip(runs[f"{arm}, batch {size}"], runs[f"{base}, batch {size}"], strict=True)
    ratios = [one["ms_per_token"] / other["ms_per_token"] for one, other in pairs]
    return [round(value, 4) for value in (statistics.median(ratios), min(ratios), max(ratios))]


def timed(llm: LLM, asks: list[tuple[str, StructuredOutputsParams]], formed: bool, size: int, tokens: int) -> dict[str, float]:
    """All asks, `size` at a time; without their form they say as many tokens as they may. Prompts are in the cache after the first."""
    masks, steps = llm.engine.grammar_masks, llm.engine.core.scheduler.stats
    forced = llm.engine.core.forced
    prompts = [[{"role": "user", "content": text}] for text, _ in asks]
    params = [
        SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=not formed, structured_outputs=form if formed else None)
        for _, form in asks
    ]
    llm.chat(prompts[:size], [SamplingParams(max_tokens=1)] * len(prompts[:size]), use_tqdm=False)
    before = masks.seconds, masks.num_masks, steps.num_steps, forced.stats.num_accepted_tokens if forced is not None else 0
    said, started = 0, time.perf_counter()
    for start in range(0, len(asks), size):
        part = slice(start, start + size)
        said += sum(len(o.outputs[0].token_ids) for o in llm.chat(prompts[part], params[part], use_tqdm=False))
    seconds = time.perf_counter() - started
    return {
        "tokens": said,
        "ms_per_token": seconds / said * 1e3,
        "mask_us_per_token": (masks.seconds - before[0]) / said * 1e6,
        "masks_per_token": (masks.num_masks - before[1]) / said,
        "steps_per_token": (steps.num_steps - before[2]) / said,
        "forced_share": ((forced.stats.num_accepted_tokens if forced is not None else 0) - before[3]) / said,
    }


def cost_table(result: dict[str, Any]) -> str:
    """As Markdown."""
    against = dict(PAIRS)
    rows = []
    for name, m in result["medians"].items():
        arm = name.partition(",")[0]
        ratio = "{:.3f} [{:.3f}–{:.3f}]".format(*result["ratios"][name]) + f" of {against[arm]}" if arm in against else "–"
        figures = [f"{m['ms_per_token']:.2f}", f"{m['mask_us_per_token']:.0f}", f"{m['steps_per_token']:.2f}", f"{m['forced_share']:.2f}"]
        rows.append([name, *figures, ratio])
    head = ["arm", "ms per token", "of that in masks, µs", "steps per token", "share of forced tokens", "ratio of times, same round"]
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    compiled = result["compile_ms"]
    note = f"{compiled['schemas']} schemas were compiled in {compiled['median']:.1f} ms in the median, {compiled['most']:.0f} ms at most."
    return "\n".join([*lines, "", note])


def _message(schema: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": "Answer with an example of this: " + json.dumps(schema)[:2000]}


def run(llm: LLM, line: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """One schema: compile, answer, check. A RequestError of the compiler is an ending; any other error is a bug, and raised."""
    schema = line["schema"]
    told = {"split": line.get("split", ""), "name": line.get("name", "")}
    try:
        form = StructuredOutputsParams(json=schema)
        llm.engine.inputs.grammars.compile(form)
    except RequestError as refused:
        return {**told, "ending": "refused", "reason": str(refused)}
    params = SamplingParams(max_tokens=max_tokens, temperature=0, structured_outputs=form)
    (completion,) = llm.chat([_message(schema)], params, use_tqdm=False)[0].outputs
    ending, reason = check(completion.text, schema, completion.finish_reason)
    return {**told, "ending": ending, "tokens": len(completion.token_ids), **({"reason": reason} if reason else {})}


def check(text: str, schema: dict[str, Any], finish_reason: str | None) -> tuple[str, str]:
    """How it ended, and why if it ended badly."""
    if finish_reason == "length":
        return "cut", ""
    if finish_reason != "stop":
        return "invalid", f"the request ended with {finish_reason}"
    try:
        validator_for(schema, jsonschema.Draft202012Validator)(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return "invalid", str(error).splitlines()[0]
    return "valid", ""


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each split and for all: how many ended how."""
    splits = sorted({run["split"] for run in runs})
    groups = {**{split: [r for r in runs if r["split"] == split] for split in splits}, "all": runs}
    return {name: _summary(group) for name, group in groups.items()}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"schemas": len(runs), **{ending: sum(run["ending"] == ending for run in runs) for ending in ENDINGS}}


def table(groups: dict[str, dict[str, Any]]) -> str:
    """The summary as Markdown."""
    columns = list(groups["all"])
    rows = [[name, *(str(group[c]) for c in columns)] for name, group in groups.items()]
    head = ["split", *(c.replace("_", " ") for c in columns)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    main()
