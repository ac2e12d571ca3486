"""`minfer fit`: would it run here? A memory table from headers alone, before anything is loaded or downloaded.

    weights + KV of `--parallel` sequences of `--ctx` tokens + the step's own buffers  <=  what is free

The weights are counted matrix by matrix in the form that each `--quant` gives them, the KV cache as `--kv-cache-dtype` stores it. Of the
buffers only the largest are counted (logits, and activations of the widest layer for a full batch), so a model that fits by less
than a tenth is called tight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from minfer.cli.command import command
from minfer.cli.inspect_model import is_on_disk
from minfer.cli.options import engine_flags
from minfer.cli.terminal import Terminal, human_bytes
from minfer.cli.weight_bytes import weight_bytes
from minfer.config import EngineConfig
from minfer.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from minfer.model_config import ModelConfig

TIGHT = 0.9  # of the free memory
ALTERNATIVES = ("none", "int8", "int4")


@command(engine=engine_flags(leave_out=["seed", "max_model_len", "max_num_seqs", "lora"]))
def fit(
    terminal: Terminal,
    engine: EngineConfig,
    ctx: Annotated[int | None, typer.Option(help="Tokens of a sequence, prompt and output (default: the longest).", min=1)] = None,
    parallel: Annotated[int, typer.Option(help="Sequences at the same time.", min=1)] = 1,
) -> None:
    """Show whether a model fits into this machine's memory, and what would. Exit code 1 if it doesn't."""
    values = plan(engine, ctx, parallel)
    if terminal.json:
        terminal.result(values)
    else:
        terminal.table(_rows(values), title=f"{values['model']}, {parallel} x {values['context']:,} tokens on {values['device']}")
        terminal.table(_alternatives(values), ("\nweights", "bytes", f"context that fits {parallel} x", "sequences of this context"))
    if values["verdict"] == "no":
        raise CapacityError(_refusal(values))


def plan(config: EngineConfig, ctx: int | None, parallel: int) -> dict[str, Any]:
    """Everything that `--json` prints; bytes and tokens. Raises ConfigError for a context beyond the model's."""
    from minfer.kvcache import KVCache, format_of
    from minfer.loader import open_checkpoint, resolve_model
    from minfer.runner.load import pick_device, pick_dtype, pick_kv_dtype, pick_max_len
    from minfer.runner.memory import available_memory

    here = config.load_format == "dummy" or is_on_disk(config.model)
    source = resolve_model(config.model, revision=config.revision, load_format=config.load_format if here else "dummy")
    checkpoint = open_checkpoint(source)
    model, device = checkpoint.config, pick_device(config)
    longest = pick_max_len(config, model)
    if ctx is not None and ctx > longest:
        raise ConfigError(f"--ctx {ctx} is more than the {longest} tokens that {config.model} was made for")
    context = ctx or longest
    dtype = pick_dtype(config, checkpoint, device)
    kv_dtype = pick_kv_dtype(config, dtype)
    block = KVCache.block_bytes(model, config.block_size, kv_dtype)
    kv = -(-context // config.block_size) * parallel * block
    buffers = _buffer_bytes(config, model, parallel, dtype.itemsize)
    free = available_memory(device)
    weights = {quant: weight_bytes(checkpoint, quant, dtype, device, config) for quant in dict.fromkeys((config.quant, *ALTERNATIVES))}
    need = weights[config.quant] + kv + buffers
    return {
        "model": config.model,
        "on_disk": here and config.load_format != "dummy",
        "device": device.type,
        "quant": config.quant,
        "quantization": checkpoint.quantization,
        "parameters": model.num_parameters,
        "active_parameters": model.num_active_parameters,
        "dtype": str(dtype).removeprefix("torch."),
        "kv_cache_dtype": format_of(kv_dtype).name,
        "context": context,
        "longest_context": longest,
        "parallel": parallel,
        "weights_bytes": weights[config.quant],
        "kv_bytes_per_token": block // config.block_size,
        "kv_bytes": kv,
        "buffer_bytes": buffers,
        "needed_bytes": need,
        "free_bytes": free,
        "verdict": "no" if need > free else "tight" if need > TIGHT * free else "yes",
        "alternatives": [
            {"quant": quant, "weights_bytes": size, **_room(free - size - buffers, block, config.block_size, context, longest, parallel)}
            for quant, size in weights.items()
        ],
    }


def _buffer_bytes(config: EngineConfig, model: ModelConfig, parallel: int, itemsize: int) -> int:
    """Logits in float32 for each sequence, and a full batch's activations at the widest place of a layer, in and out."""
    inner = max(model.intermediate_size, 0 if model.moe is None else model.moe.experts_per_token * model.moe.intermediate_size)
    widest = max(2 * inner, model.hidden_size, model.num_heads * model.head_dim)
    return parallel * model.vocab_size * 4 + config.max_num_batched_tokens * (widest + model.hidden_size) * 2 * itemsize


def _room(left: int, block: int, block_size: int, context: int, longest: int, parallel: int) -> dict[str, int]:
    blocks = max(left, 0) // block
    return {
        "context_that_fits": min(blocks // parallel * block_size, longest),
        "sequences_that_fit": blocks // -(-context // block_size),
    }


def _rows(v: dict[str, Any]) -> list[tuple[str, str]]:
    note = "" if v["on_disk"] else " (from the model's shape: it is not on this machine)"
    form = v["quantization"] if v["quant"] == "auto" else v["quant"]
    verdict = {"yes": "it fits", "tight": "it fits, by less than a tenth", "no": "it does NOT fit"}[v["verdict"]]
    share = v["active_parameters"] / v["parameters"]
    active = f", a token meets {share:.0%} of them" if share < 1 else ""
    return [
        ("weights", f"{human_bytes(v['weights_bytes'])} as {form or v['dtype']}{active}{note}"),
        ("KV cache", f"{human_bytes(v['kv_bytes'])}: {human_bytes(v['kv_bytes_per_token'])} a token as {v['kv_cache_dtype']}"),
        ("buffers", f"{human_bytes(v['buffer_bytes'])}, about"),
        ("together", human_bytes(v["needed_bytes"])),
        ("free", human_bytes(v["free_bytes"])),
        ("verdict", verdict),
    ]


def _alternatives(v: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    names = {"auto": "as it is", "none": v["dtype"]}
    return [
        (
            names.get(a["quant"], f"--quant {a['quant']}"),
            human_bytes(a["weights_bytes"]),
            f"{a['context_that_fits']:,}",
            f"{a['sequences_that_fit']:,}",
        )
        for a in v["alternatives"]
    ]


def _refusal(v: dict[str, Any]) -> str:
    """One sentence, with what would do instead."""
    own = next(a for a in v["alternatives"] if a["quant"] == v["quant"])
    ways = [f"--ctx {own['context_that_fits']}"] if own["context_that_fits"] else []
    ways += [f"--parallel {own['sequences_that_fit']}"] if own["sequences_that_fit"] and v["parallel"] > 1 else []
    smaller = [a for a in v["alternatives"] if a["quant"] in ("int8", "int4") and a["sequences_that_fit"] >= v["parallel"]]
    ways += [f"--quant {a['quant']}" for a in smaller[:1]]
    remedy = f"try {' or '.join(ways)}" if ways else "take a smaller model, or a machine with more memory"
    return f"{v['model']} needs {human_bytes(v['needed_bytes'])} and {human_bytes(v['free_bytes'])} are free; {remedy}"
