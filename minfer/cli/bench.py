"""`minfer bench`: how fast a model runs here. One number per phase, each the median of repeats, with the spread beside it.

    prefill   prompt tokens / time until every request has its first token
    decode    tokens after that moment / the time they took

Prompts are random token ids, new ones for every repeat, so that the prefix cache can't help; end-of-text is ignored, so that every
run does the same work. Beside the speeds stands what the host spends per decode step, part by part, outside the model and the wait for it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minfer.cli.command import command
from minfer.cli.engine import load_llm
from minfer.cli.measure import Run, Shape, measure, peak_memory
from minfer.cli.options import engine_flags
from minfer.cli.terminal import Terminal, human_bytes
from minfer.config import EngineConfig
from minfer.errors import ConfigError

if TYPE_CHECKING:
    from minfer.engine.engine import Engine

_SPEEDS: dict[str, Callable[[Run], float | None]] = {
    "prefill_tokens_per_s": lambda run: run.prefill_tokens_per_s,
    "decode_tokens_per_s": lambda run: run.decode_tokens_per_s,
    "time_to_first_token_s": lambda run: statistics.median(run.first_token_s),
    "time_per_output_token_s": lambda run: run.decode_s / run.decode_steps if run.decode_steps else None,
    "total_s": lambda run: run.prefill_s + run.decode_s,
}


@command(engine=engine_flags())
def bench(
    terminal: Terminal,
    engine: EngineConfig,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.", min=1)] = 512,
    output_tokens: Annotated[int, typer.Option(help="Tokens generated after each prompt.", min=1)] = 128,
    batch_size: Annotated[int, typer.Option(help="Requests that run together.", min=1)] = 1,
    repeats: Annotated[int, typer.Option(help="Measured runs; the median is reported.", min=1)] = 3,
    warmup: Annotated[int, typer.Option(help="Runs before them that don't count.", min=0)] = 1,
    simulate: Annotated[
        str | None, typer.Option(help="Play this GPU (h100, h200) to see whether the host keeps up with it; see docs/host-time.md.")
    ] = None,
) -> None:
    """Measure prefill and decode speed, memory, and the host's cost per step."""
    if batch_size > engine.max_num_seqs:
        raise ConfigError(f"--batch-size {batch_size} is above max_num_seqs={engine.max_num_seqs}; add --max-num-seqs {batch_size}")
    shape = Shape(prompt_tokens, output_tokens, batch_size)
    if simulate is not None:
        from minfer.cli import simulated

        played = simulated.simulate(engine, simulate, shape)
        if terminal.json:
            terminal.result(played)
        else:
            terminal.table(simulated.rows(played))
        return
    llm, phases = load_llm(terminal, engine)
    _check_context(shape, llm.engine)
    rng = random.Random(engine.seed or 0)
    runs = _runs(terminal, llm.engine, shape, rng, warmup, repeats)
    if runs[0].preemptions:
        terminal.note("the KV cache is too small for this batch: requests were preempted and computed twice; raise --kv-cache-memory")
    result = _result(llm.engine, shape, runs, phases)
    if terminal.json:
        terminal.result(result)
    else:
        terminal.table(_rows(result))


def _check_context(shape: Shape, engine: Engine) -> None:
    needed, limit = shape.prompt_tokens + shape.output_tokens, engine.inputs.max_model_len
    if needed > limit:
        raise ConfigError(
            f"{shape.prompt_tokens} prompt and {shape.output_tokens} output tokens are more than the context of {limit}; ask for fewer"
        )


def _runs(terminal: Terminal, engine: Engine, shape: Shape, rng: random.Random, warmup: int, repeats: int) -> list[Run]:
    from minfer.engine.progress import progress_bar

    runs = []
    with progress_bar("Measuring", warmup + repeats, not terminal.json) as progress:
        for n in range(warmup + repeats):
            run = measure(engine, shape, rng)
            progress.advance()
            if n >= warmup:
                runs.append(run)
    return runs


def _result(engine: Engine, shape: Shape, runs: Sequence[Run], phases: dict[str, float]) -> dict[str, Any]:
    spread: dict[str, list[float] | None] = {}
    medians: dict[str, float | None] = {}
    for name, of in _SPEEDS.items():
        values = [value for run in runs if (value := of(run)) is not None]
        medians[name] = statistics.median(values) if values else None
        spread[name] = [min(values), max(values)] if values else None
    loaded, config = engine.core.loaded, engine.config
    hosts = [run.host_s_per_step for run in runs if run.decode_steps]
    host = {part: statistics.median(h[part] for h in hosts) * 1e3 for part in hosts[0]} if hosts else {}
    block_bytes = loaded.cache.block_bytes(loaded.model_config, config.block_size, loaded.cache.dtype)
    return {
        "model": config.model,
        **medians,
        "peak_memory_bytes": peak_memory(),
        **_gpu_memory(loaded.device),
        "kv_cache_bytes": loaded.cache.num_blocks * block_bytes,
        "kv_bytes_used": max(run.peak_blocks for run in runs) * block_bytes,
        "host_ms_per_decode_step": host | {"total": sum(host.values())} if host else None,
        "min_max": spread,
        "prompt_tokens": shape.prompt_tokens,
        "output_tokens": shape.output_tokens,
        "batch_size": shape.batch_size,
        "repeats": len(runs),
        "cached_prompt_tokens": sum(run.cached_tokens for run in runs),
        "preemptions": sum(run.preemptions for run in runs),
        "speculation": _speculation(runs, config.adaptive_drafts),
        "device": loaded.device.type,
        "dtype": config.dtype,
        "kv_cache_dtype": config.kv_cache_dtype,
        "kernels": loaded.ops.chosen,
        "load_seconds": phases,
    }


def _speculation(runs: Sequence[Run], adaptive: bool) -> dict[str, Any] | None:
    """Over all measured runs; None where nothing is guessed ahead. `accepted_at` counts right guesses by their place in the draft.

    Where drafts aren't `adaptive` no step goes without them, so nothing is known of what they gain.
    """
    all_stats = [run.speculation for run in runs if run.speculation is not None]
    if not all_stats:
        return None
    gained = sum(stats.seconds_gained for stats in all_stats)
    return {
        "drafts": sum(stats.num_drafts for stats in all_stats),
        "draft_tokens": sum(stats.num_draft_tokens for stats in all_stats),
        "accepted_tokens": sum(stats.num_accepted_tokens for stats in all_stats),
        "accepted_at": [sum(counts) for counts in zip(*(stats.accepted_at for stats in all_stats), strict=True)],
        "mean_accepted_length": 1 + sum(stats.num_accepted_tokens for stats in all_stats) / max(1, sum(s.num_drafts for s in all_stats)),
        "estimated_speedup": 1 + gained / sum(run.decode_s for run in runs) if adaptive else None,
    }


def _gpu_memory(device: Any) -> dict[str, int]:
    import torch

    return {"peak_gpu_memory_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    def timed(label: str, name: str, unit: str, scale: float = 1.0) -> tuple[str, str]:
        if result[name] is None:
            return label, "not measured: it takes at least 2 output tokens"
        low, high = result["min_max"][name]
        return label, f"{result[name] * scale:,.1f} {unit}  ({low * scale:,.1f} to {high * scale:,.1f})"

    shape = f"{result['batch_size']} x ({result['prompt_tokens']} + {result['output_tokens']} tokens), median of {result['repeats']}"
    memory = human_bytes(result["peak_memory_bytes"])
    if "peak_gpu_memory_bytes" in result:
        memory += f", on the GPU {human_bytes(result['peak_gpu_memory_bytes'])}"
    host = result["host_ms_per_decode_step"]
    parts = ", ".join(f"{name} {ms:.3f}" for name, ms in host.items() if name != "total") if host else ""
    return [
        ("model", f"{result['model']}, {result['dtype']} on {result['device']}"),
        ("shape", shape),
        timed("prefill", "prefill_tokens_per_s", "tokens/s"),
        timed("decode", "decode_tokens_per_s", "tokens/s"),
        timed("first token", "time_to_first_token_s", "ms", 1e3),
        timed("decode step", "time_per_output_token_s", "ms", 1e3),
        ("host per decode step", f"{host['total']:.3f} ms outside the model ({parts})" if host else "not measured"),
        ("peak memory", memory),
        ("KV cache", f"{result['kv_cache_dtype']}, {human_bytes(result['kv_bytes_used'])} used of {human_bytes(result['kv_cache_bytes'])}"),
        *_speculation_row(result["speculation"]),
        ("load", f"{result['load_seconds']['total']:.2f} s"),
    ]


def _speculation_row(counts: dict[str, Any] | None) -> list[tuple[str, str]]:
    if counts is None:
        return []
    share = f" ({counts['accepted_tokens'] / counts['draft_tokens']:.0%})" if counts["draft_tokens"] else ""
    by_place = ", ".join(f"{right / max(1, counts['drafts']):.0%}" for right in counts["accepted_at"] if right)
    rows = [
        ("guessed ahead", f"{counts['draft_tokens']} tokens, {counts['accepted_tokens']} right{share}; random prompts are hard to guess"),
        ("tokens a draft step", f"{counts['mean_accepted_length']:.2f}" + (f"; right at depth 1, 2, ...: {by_place}" if by_place else "")),
    ]
    if counts["estimated_speedup"] is not None:
        rows.append(("gained by it", f"{counts['estimated_speedup']:.2f}x, estimated from the measured cost of steps and drafts"))
    return rows
