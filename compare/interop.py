"""Whether another engine reads a quantised checkpoint as minfer does: the greedy tokens of both, from the same token ids.

    python -m compare.interop CHECKPOINT --engine transformers --python /path/to/its/python
    python -m compare.interop CHECKPOINT --engine vllm --dtype float16

The other engine runs in an environment of its own (by default the one `python -m compare` set up for vLLM, which has transformers and
compressed-tensors as well). In float32 the two agree as long as both dequantise to the same numbers; in 16 bits they may part
where two tokens are about equally likely, so the first difference is reported, not judged.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from compare.environments import venv_python
from compare.errors import CompareError

PROMPTS = [[1, 9690, 198, 2683, 359], [504, 2644, 314, 253, 1123], [12, 50, 99, 400, 300, 200]]
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.interop", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engine", choices=list(ENGINES), default="transformers")
    parser.add_argument("--python", type=Path, default=venv_python("vllm"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=24)
    options = parser.parse_args()
    other = theirs(options.engine, options.python, options.checkpoint, PROMPTS, options.tokens, options.dtype)
    own = ours(options.checkpoint, PROMPTS, options.tokens, options.dtype)
    report: list[dict[str, Any]] = [
        {"prompt": prompt, "first_difference": first_difference(a, b), "minfer": a, options.engine: b}
        for prompt, a, b in zip(PROMPTS, own, other, strict=True)
    ]
    print(json.dumps(report, indent=1))
    sys.exit(any(item["first_difference"] is not None for item in report))


if __name__ == "__main__":
    main()
