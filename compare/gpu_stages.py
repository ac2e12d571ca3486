"""The stages of `make gpu` that aren't programs of their own: the tests, and whole models with random weights.

`python -m compare.gpu_stages bench llama2-7b --format int4`. Each prints what it is at to stderr and one JSON object as its last line.
They wind up by themselves when `--seconds` are nearly over, and say in the result what they left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# pytest's arguments; one process each, because most of the time goes into compiling kernels, on one core a process.
TESTS = (
    ("tests/kernels/test_triton_attention.py",),
    ("tests/kernels/test_triton_elementwise.py",),
    ("tests/kernels/test_triton_linear.py",),
    ("tests/kernels/test_triton_kv_codes.py",),
    ("tests/kernels/test_triton_engine.py",),
    ("tests/runner/test_decode_graphs.py", "tests/runner/test_upload.py"),
    ("tests/sampling/test_sampler.py", "-m", "gpu"),
)
BATCH_SIZES = (1, 8, 64, 256)
PROMPT_TOKENS, OUTPUT_TOKENS = 256, 64
REQUESTS, SHORTEST, LONGEST = 256, 100, 1024
WIND_UP = 8.0  # seconds before the end in which nothing new is begun


def tests(seconds: float) -> dict[str, Any]:
    """All at once. Raises SystemExit after printing the failures, if there are any."""
    deadline = time.monotonic() + seconds - WIND_UP
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    running = {
        chosen[0]: subprocess.Popen(
            [*command, *chosen], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        for chosen in TESTS
    }
    result: dict[str, Any] = {}
    for name, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            said += "\ncut off\n"
        lines = said.strip().splitlines() or ["said nothing"]
        result[name] = {"passed": process.returncode == 0, "summary": lines[-1]}
        if process.returncode != 0:
            print("\n".join(lines[-40:]))
    print(json.dumps(result))
    if not all(one["passed"] for one in result.values()):
        raise SystemExit(1)
    return result


def load(model: str, form: str, device: str, **settings: Any) -> Any:
    """minfer with random weights; `form` is bf16, or what they are quantised to."""
    from minfer import LLM

    quant = {} if form == "bf16" else {"quant": form}
    dtype = "bfloat16" if device == "cuda" else "float32"
    return LLM(model, load_format="dummy", dtype=dtype, device=device, prefix_caching=False, **quant, **settings)


def bench(model: str, form: str, device: str, seconds: float, sizes: Sequence[int] = BATCH_SIZES) -> dict[str, Any]:
    """`minfer bench`, at several batch sizes in one process: loading takes longer than measuring."""
    from minfer.cli.measure import Shape, measure  # the function behind the command, which itself needs typer

    deadline = time.monotonic() + seconds - WIND_UP
    started = time.monotonic()
    llm = load(model, form, device, max_num_seqs=max(sizes), max_num_batched_tokens=8192, max_model_len=PROMPT_TOKENS + OUTPUT_TOKENS)
    blocks = -(-(PROMPT_TOKENS + OUTPUT_TOKENS) // llm.engine.config.block_size)  # that a sequence fills
    result: dict[str, Any] = {
        "format": form,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "load_seconds": time.monotonic() - started,
        "kernels": llm.engine.core.loaded.ops.chosen,
        "room_for_all": llm.engine.core.loaded.cache.num_blocks >= max(sizes) * blocks,
        "batches": {},
    }
    rng = random.Random(0)
    for size in sizes:
        shape, runs = Shape(PROMPT_TOKENS, OUTPUT_TOKENS, size), []
        for turn in range(4):  # the first compiles what this size needs
            if turn and time.monotonic() > deadline:
                break
            note(f"{form}, batch {size}, run {turn}")
            run = measure(llm.engine, shape, rng)
            if turn:
                runs.append(run)
        if runs:
            result["batches"][str(size)] = {
                "decode_tokens_per_s": statistics.median(run.decode_tokens_per_s or 0.0 for run in runs),
                "decode_step_ms": statistics.median(run.decode_s / max(run.decode_steps, 1) * 1e3 for run in runs),
                "prefill_tokens_per_s": statistics.median(run.prefill_tokens_per_s for run in runs),
                "host_ms_per_step": {
                    part: statistics.median(run.host_s_per_step[part] for run in runs) * 1e3 for part in runs[0].host_s_per_step
                },
                "preemptions": sum(run.preemptions for run in runs),
                "repeats": len(runs),
            }
    return result | device_memory(device)


def requests(vocab_size: int, count: int = REQUESTS) -> list[tuple[list[int], int]]:
    """Prompt and number of tokens wanted, the same for every engine."""
    rng = random.Random(0)
    sizes = [(rng.randint(SHORTEST, LONGEST), rng.randint(SHORTEST, LONGEST)) for _ in range(count)]
    return [([rng.randrange(vocab_size) for _ in range(prompt)], output) for prompt, output in sizes]


def offline_minfer(model: str, device: str, seconds: float, work: Sequence[tuple[list[int], int]] | None = None) -> dict[str, Any]:
    from minfer import SamplingParams

    deadline = time.monotonic() + seconds - WIND_UP
    llm = load(model, "bf16", device, max_num_seqs=REQUESTS, max_num_batched_tokens=8192, max_model_len=2 * LONGEST)
    work = work or requests(llm.engine.model_config.vocab_size)
    note("warm up")
    for prompt, _ in work[:2]:
        llm.generate({"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)
    engine, done, tokens = llm.engine, 0, 0
    started = time.monotonic()
    for n, (prompt, wanted) in enumerate(work):
        params = SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True)
        engine.add_request(f"offline-{n}", {"prompt_token_ids": prompt}, params, kind="delta")
    while engine.has_unfinished_requests and time.monotonic() < deadline:
        for output in engine.step():
            tokens += sum(len(completion.token_ids) for completion in output.outputs)
            done += output.finished
    spent = time.monotonic() - started
    engine.abort([f"offline-{n}" for n in range(len(work))])
    return {"engine": "minfer", **_throughput(work, done, tokens, spent), **device_memory(device)}


def offline_transformers(
    model: str, device: str, seconds: float, work: Sequence[tuple[list[int], int]] | None = None, batch_size: int = 64
) -> dict[str, Any]:
    """`generate` with SDPA on left-padded static batches, until the time is over. A batch runs as long as its longest request."""
    import torch
    import transformers

    from minfer.loader.names import KNOWN

    deadline = time.monotonic() + seconds - WIND_UP
    shape = {name: value for name, value in KNOWN[model].config.items() if name not in ("architectures", "dtype")}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        net = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**shape), dtype=dtype).eval()
    work = work or requests(net.config.vocab_size)
    note("warm up")
    _generate(net, work[:2], 4)
    done = tokens = 0
    started = time.monotonic()
    for begin in range(0, len(work), batch_size):
        batch = work[begin : begin + batch_size]
        longest = max(wanted for _, wanted in batch)
        if begin and time.monotonic() + (time.monotonic() - started) * batch_size / begin > deadline:
            break  # another batch like those so far wouldn't end in time
        _generate(net, batch, longest)
        done, tokens = done + len(batch), tokens + sum(wanted for _, wanted in batch)
    spent = time.monotonic() - started
    made = {"engine": "transformers", "version": transformers.__version__, "batch_size": batch_size}
    return {**made, **_throughput(work, done, tokens, spent), **device_memory(device)}


def _generate(net: Any, batch: Sequence[tuple[list[int], int]], new: int) -> None:
    import torch

    width = max(len(prompt) for prompt, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(batch):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    limits: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        net.generate(ids.to(net.device), attention_mask=mask.to(net.device), **limits)
        if net.device.type == "cuda":
            torch.cuda.synchronize()


def _throughput(work: Sequence[tuple[list[int], int]], done: int, tokens: int, seconds: float) -> dict[str, Any]:
    counts = {"requests": len(work), "finished": done, "output_tokens": tokens, "seconds": seconds}
    return {**counts, "output_tokens_per_s": tokens / seconds if seconds else None}


def device_memory(device: str) -> dict[str, Any]:
    import torch

    return {"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


OFFLINE: dict[str, Callable[[str, str, float], dict[str, Any]]] = {"minfer": offline_minfer, "transformers": offline_transformers}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m compare.gpu_stages")
    parser.add_argument("stage", choices=("tests", "bench", "offline"))
    parser.add_argument("model", nargs="?", default="llama2-7b")
    parser.add_argument("--format", default="bf16", help="bf16, or a --quant of minfer")
    parser.add_argument("--engine", choices=OFFLINE, default="minfer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    if options.stage == "tests":
        tests(options.seconds)
        return
    with contextlib.redirect_stdout(sys.stderr):
        if options.stage == "bench":
            result = bench(options.model, options.format, options.device, options.seconds)
        else:
            result = OFFLINE[options.engine](options.model, options.device, options.seconds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
