"""The n-gram speculation of vLLM and llama.cpp on the same texts, each in the environment that `python -m compare setup` made for it.

    vLLM         speculative_config ngram, 8 tokens, runs of 2 to 5        bf16
    llama.cpp    llama-cpp-python's LlamaPromptLookupDecoding, 8 tokens    the shipped Q4_1 file, as minfer runs it

Both decode the same prompt ids greedily, with and without. vLLM is timed as the difference between a long and a one-token answer,
llama.cpp from its first token to its last; a figure is the median over rounds.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare.environments import venv_python
from compare.errors import CompareError
from compare.weights import get_weights, smollm2_gguf

MARK = "SPEEDS "
VLLM = """
import json, os, statistics, sys, time
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
os.environ |= {"VLLM_USE_AOT_COMPILE": "0", "VLLM_NO_USAGE_STATS": "1"}
from vllm import LLM, SamplingParams
folder, prompts, count, rounds, drafts = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
more = {}
if drafts:
    more["speculative_config"] = {"method": "ngram", "num_speculative_tokens": drafts, "prompt_lookup_max": 5, "prompt_lookup_min": 2}
llm = LLM(model=folder, dtype="bfloat16", max_model_len=2048, max_num_seqs=1, **more)
def run(prompt, tokens):
    params = SamplingParams(max_tokens=tokens, temperature=0.0, detokenize=False)
    started = time.perf_counter()
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return time.perf_counter() - started, len(output.outputs[0].token_ids)
speeds = {}
for name, prompt in prompts.items():
    run(prompt, count)
    found = []
    for _ in range(rounds):
        short, _n = run(prompt, 1)
        whole, said = run(prompt, count)
        found.append((said - 1) / (whole - short))
    speeds[name] = statistics.median(found)
print("SPEEDS " + json.dumps(speeds))
"""
LLAMACPP = """
import json, statistics, sys, time
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
file, prompts, count, rounds, drafts = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
draft = LlamaPromptLookupDecoding(num_pred_tokens=drafts, max_ngram_size=5) if drafts else None
llm = Llama(file, n_ctx=2048, n_threads=2, n_threads_batch=2, flash_attn=True, verbose=False, draft_model=draft)
def run(prompt):
    llm.reset()
    times = []
    for token in llm.generate(prompt, temp=0.0, repeat_penalty=1.0):
        times.append(time.perf_counter())
        if token == llm.token_eos() or len(times) == count:
            break
    return (len(times) - 1) / (times[-1] - times[0])
speeds = {}
for name, prompt in prompts.items():
    run(prompt)
    speeds[name] = statistics.median(run(prompt) for _ in range(rounds))
print("SPEEDS " + json.dumps(speeds))
"""
PEERS = {"vllm": ("vLLM, bf16", VLLM), "llamacpp": ("llama.cpp, Q4_1", LLAMACPP)}


def measure(peer: str, prompts: Mapping[str, Sequence[int]], tokens: int, rounds: int, drafts: int) -> list[dict[str, Any]]:
    """Tokens per second of each text, without drafts and with. Raises CompareError with the engine's last words if it fails."""
    title, script = PEERS[peer]
    python = venv_python(peer)
    if not python.is_file():
        raise CompareError(f"{peer} has no environment; run `python -m compare setup {peer}` first")
    model: Path = get_weights("smollm2-135m").folder if peer == "vllm" else smollm2_gguf()
    runs = []
    for count in (0, drafts):
        arguments = [str(model), json.dumps({name: list(ids) for name, ids in prompts.items()}), str(tokens), str(rounds), str(count)]
        done = subprocess.run([str(python), "-c", script, *arguments], capture_output=True, text=True, check=False)
        line = next((line for line in done.stdout.splitlines() if line.startswith(MARK)), None)
        if line is None:
            raise CompareError(f"{peer} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
        speeds = json.loads(line.removeprefix(MARK))
        runs += [{"engine": title, "text": name, "drafts": count, "tokens_per_s": speed} for name, speed in speeds.items()]
    return runs


def table(results: dict[str, Any]) -> str:
    texts = list(dict.fromkeys(run["text"] for run in results["runs"]))
    found = {(run["engine"], run["text"], run["drafts"] > 0): run["tokens_per_s"] for run in results["runs"]}
    lines = [
        f"Prompt lookup of other engines on the same prompts, tokens/s without and with it; `{results['command']}`.",
        "",
        "| engine | " + " | ".join(texts) + " |",
        "|---" * (len(texts) + 1) + "|",
    ]
    for engine in dict.fromkeys(run["engine"] for run in results["runs"]):
        pairs = [(found[engine, text, False], found[engine, text, True]) for text in texts]
        lines.append(f"| {engine} | " + " | ".join(f"{plain:,.0f} → {fast:,.0f} ({fast / plain:.2f}x)" for plain, fast in pairs) + " |")
    return "\n".join(lines) + "\n"
