"""`python -m compare.structured SCHEMAS.jsonl`: how much of JSON Schema minfer can promise, and what the promise costs.

Each line of the file holds an object with a `schema` (and, if it likes, `split` and `name`). Every schema that compiles is answered by
the model, greedily, and what comes out is checked with `jsonschema`, an implementation that shares nothing with the one that made the
grammar. So there are four endings: refused (a 400 in the server), valid, cut by `--max-tokens`, and invalid, of which there must be none.
The cost is counted inside the engine: seconds in the mask of a row, on average over all tokens of a schema.
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

ENDINGS = ("valid", "cut", "refused", "invalid")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.structured", description=__doc__.splitlines()[0])
    parser.add_argument("schemas", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=0, help="schemas to take, spread evenly over the file (default: all)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, help="write the results as JSON to this file")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.schemas.read_text().splitlines() if line.strip()]
    if args.limit:
        lines = [lines[index * len(lines) // args.limit] for index in range(min(args.limit, len(lines)))]
    llm = LLM(args.model, max_model_len=2048)
    llm.engine.inputs.grammars.compile(StructuredOutputsParams(choice=["a"]))  # makes the vocabulary's tables, once for all grammars
    runs = [run(llm, line, args.max_tokens) for line in lines]
    result = {
        "machine": machine.describe(),
        "versions": {name: version(name) for name in ("minfer", "llguidance", "jsonschema", "torch")},
        "command": f"python -m compare.structured SCHEMAS.jsonl --limit {len(lines)} --max-tokens {args.max_tokens}",
        "model": args.model,
        "summary": summary(runs),
        "runs": runs,
    }
    print(table(result["summary"]))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def run(llm: LLM, line: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """One schema: compile, answer, check. A RequestError of the compiler is an ending; any other error is a bug, and raised."""
    schema = line["schema"]
    told = {"split": line.get("split", ""), "name": line.get("name", "")}
    started = time.perf_counter()
    try:
        form = StructuredOutputsParams(json=schema)
        llm.engine.inputs.grammars.compile(form)
    except RequestError as refused:
        return {**told, "ending": "refused", "compile_ms": _ms(started), "reason": str(refused)}
    compiled = _ms(started)
    masks, seconds = llm.engine.grammar_masks.num_masks, llm.engine.grammar_masks.seconds
    message = {"role": "user", "content": "Answer with an example of this: " + json.dumps(schema)[:2000]}
    params = SamplingParams(max_tokens=max_tokens, temperature=0, structured_outputs=form)
    started = time.perf_counter()
    (completion,) = llm.chat([message], params, use_tqdm=False)[0].outputs
    count = llm.engine.grammar_masks.num_masks - masks
    ending, reason = check(completion.text, schema, completion.finish_reason)
    return {
        **told,
        "ending": ending,
        "compile_ms": compiled,
        "tokens": count,
        "mask_us_per_token": round((llm.engine.grammar_masks.seconds - seconds) / max(count, 1) * 1e6, 1),
        "answer_ms": _ms(started),
        **({"reason": reason} if reason else {}),
    }


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
    """For each split and for all: how many ended how, and what it cost."""
    splits = sorted({run["split"] for run in runs})
    groups = {**{split: [r for r in runs if r["split"] == split] for split in splits}, "all": runs}
    return {name: _summary(group) for name, group in groups.items()}


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    masks = [run["mask_us_per_token"] for run in runs if run.get("tokens")]
    endings = {ending: sum(run["ending"] == ending for run in runs) for ending in ENDINGS}
    return {
        "schemas": len(runs),
        **endings,
        "compile_ms_median": round(statistics.median(run["compile_ms"] for run in runs), 2),
        "compile_ms_max": max(run["compile_ms"] for run in runs),
        "mask_us_per_token_median": round(statistics.median(masks), 1) if masks else None,
        "mask_us_per_token_max": max(masks, default=None),
    }


def table(groups: dict[str, dict[str, Any]]) -> str:
    """The summary as Markdown."""
    columns = list(groups["all"])
    rows = [[name, *("–" if group[c] is None else str(group[c]) for c in columns)] for name, group in groups.items()]
    head = ["split", *(c.replace("_", " ") for c in columns)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 2)


if __name__ == "__main__":
    main()
