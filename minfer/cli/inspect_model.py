"""`minfer inspect`: what a model is, what it needs, and what fits on this machine, from headers alone.

A model whose weights are not here yet is described from its config file or the table of known shapes; nothing large is ever
downloaded for this. The memory numbers are those of the engine: weights in the form that `--quant` runs, and the KV budget that
`--memory-utilization` or `--kv-cache-memory` gives on the memory that is free now, with what each `--kv-cache-dtype` makes of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from minfer.cli.command import command
from minfer.cli.options import engine_flags
from minfer.cli.terminal import Terminal, human_bytes
from minfer.cli.weight_bytes import weight_bytes
from minfer.config import EngineConfig
from minfer.errors import ModelLoadError
from minfer.model_config import ModelConfig

if TYPE_CHECKING:
    from minfer.loader import Checkpoint

USERS = (1, 4, 16, 64)


@command(engine=engine_flags(leave_out=["seed", "lora"]))
def inspect_model(terminal: Terminal, engine: EngineConfig) -> None:
    """Show a model's architecture, what its weights and KV cache take, and what fits on this machine."""
    from minfer.loader import open_checkpoint, resolve_model

    here = engine.load_format == "dummy" or is_on_disk(engine.model)
    if not here:
        _refuse_quantised_twin(engine.model)
    source = resolve_model(engine.model, revision=engine.revision, load_format=engine.load_format if here else "dummy")
    values = {"model": engine.model, "on_disk": here and engine.load_format != "dummy", **describe(engine, open_checkpoint(source))}
    if not here:  # the stand-in's format and bytes are not the model's
        values |= {"format": None, "disk_bytes": None, "files": [], "disk_bytes_by_dtype": {}}
    if terminal.json:
        terminal.result(values)
        return
    if not here:
        terminal.note(f"{engine.model} is not on this machine; this is its shape, and running it would download it")
    terminal.table(_rows(values))


def _refuse_quantised_twin(name: str) -> None:
    from minfer.loader.names import find

    known = find(name)
    if known is not None and known[1] is not None:
        plain = name.removesuffix(f"-{known[1]}")
        raise ModelLoadError(
            f"{name} is not on this machine, and only its file tells how it is quantised; `minfer inspect {plain}` shows the model's shape"
        )


def is_on_disk(name: str) -> bool:
    """Whether resolving the name needs no network."""
    from minfer.loader import list_offline_models
    from minfer.loader.names import KNOWN, find

    if os.path.exists(os.path.expanduser(name)):
        return True
    names = {model.name for model in list_offline_models()}
    ids = names | {KNOWN[n].repo for n in names if n in KNOWN}
    known = find(name)
    if known is None:
        return name in ids
    model, twin = known
    return name in names or (model.twins[twin] if twin else model.repo) in ids


def describe(config: EngineConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that `--json` prints: shapes, bytes, and the longest contexts that fit.

    kv_capacity_by_dtype: how many times the tokens that fit where K and V are stored as the model computes.
    """
    from minfer.kvcache import KVCache, format_of
    from minfer.runner.load import pick_device, pick_dtype, pick_kv_dtype, pick_max_len

    model, summary = checkpoint.config, checkpoint.describe()
    device = pick_device(config)
    dtype = pick_dtype(config, checkpoint, device)
    max_len = pick_max_len(config, model)
    kv_dtype = pick_kv_dtype(config, dtype)
    per_token = KVCache.token_bytes(model, kv_dtype)
    blocks = _block_bytes(config, model)
    fits = _fits(config, weight_bytes(checkpoint, config.quant, dtype, device, config), per_token, max_len, device)
    return {
        "architecture": model.architecture,
        "parameters": model.num_parameters,
        "active_parameters": model.num_active_parameters,
        "experts": None if model.moe is None else model.moe.num_experts,
        "experts_per_token": None if model.moe is None else model.moe.experts_per_token,
        "expert_size": None if model.moe is None else model.moe.intermediate_size,
        "layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "attention_heads": model.num_heads,
        "kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "tied_embeddings": model.tie_word_embeddings,
        "rope": model.rope.kind,
        "sliding_window": next((window for window in model.sliding_windows if window), None),
        "max_model_len": max_len,
        "format": summary.format,
        "quantization": summary.quantization,
        "quant": config.quant,
        "checkpoint_dtype": model.dtype,
        "files": [str(file) for file in summary.files],
        "tensors": summary.num_tensors,
        "disk_bytes": summary.num_bytes,
        "disk_bytes_by_dtype": dict(summary.bytes_by_dtype),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "kv_cache_dtype": format_of(kv_dtype).name,
        "kv_bytes_per_token": per_token,
        **fits,
        "kv_tokens_by_dtype": {name: fits["kv_cache_bytes"] // block * config.block_size for name, block in blocks.items()},
        "kv_capacity_by_dtype": {name: KVCache.block_bytes(model, config.block_size, dtype) / block for name, block in blocks.items()},
    }


def _block_bytes(config: EngineConfig, model: ModelConfig) -> dict[str, int]:
    """What a block takes in each type of `kv_cache_dtype` that this model's head size allows."""
    from minfer.kvcache import FORMATS, KVCache

    possible = {name: kind.dtype for name, kind in FORMATS.items() if not (kind.packed and model.head_dim % 2)}
    return {name: KVCache.block_bytes(model, config.block_size, dtype) for name, dtype in possible.items()}


def _fits(config: EngineConfig, weights: int, per_token: int, max_len: int, device: Any) -> dict[str, Any]:
    """Contexts in tokens, rounded down to whole blocks; 0 where the weights alone are too much."""
    from minfer.runner.memory import available_memory, kv_share

    free = available_memory(device)
    left = max(free - weights, 0)
    share = kv_share(config, device)
    budget = min(config.kv_cache_memory, left) if config.kv_cache_memory is not None else int(left * share)
    blocks = budget // (per_token * config.block_size)
    contexts = {users: min(blocks // users * config.block_size, max_len) for users in sorted({*USERS, config.max_num_seqs})}
    return {
        "weights_bytes": weights,
        "free_memory_bytes": free,
        "weights_fit": weights < free,
        "kv_cache_bytes": budget,
        "full_length_sequences": blocks * config.block_size // max_len,
        "max_context_by_users": contexts,
    }


def _rows(v: dict[str, Any]) -> list[tuple[str, str]]:
    tied = ", output head tied to it" if v["tied_embeddings"] else ""
    window = f", sliding window {v['sliding_window']}" if v["sliding_window"] else ""
    types = ", ".join(f"{name} {human_bytes(size)}" for name, size in v["disk_bytes_by_dtype"].items())
    contexts = ", ".join(f"{users} x {tokens:,}" for users, tokens in v["max_context_by_users"].items())
    tokens = [f"{name} {n:,} ({v['kv_capacity_by_dtype'][name]:.2f}x)" for name, n in v["kv_tokens_by_dtype"].items()]
    active = f", of which a token meets {v['active_parameters'] / 1e6:,.1f} M" if v["experts"] else ""
    rows = [
        ("model", v["model"]),
        ("architecture", v["architecture"]),
        ("parameters", f"{v['parameters'] / 1e6:,.1f} M{active}"),
        ("layers", f"{v['layers']} x (hidden {v['hidden_size']}, feed-forward {v['intermediate_size']})"),
        ("attention", f"{v['attention_heads']} heads of {v['head_dim']}, {v['kv_heads']} KV heads, rope {v['rope']}{window}"),
        ("vocabulary", f"{v['vocab_size']:,}{tied}"),
        ("context", f"{v['max_model_len']:,} tokens"),
        ("quantisation", v["quantization"] or "none"),
    ]
    if v["experts"]:
        rows.insert(4, ("experts", f"{v['experts']} of width {v['expert_size']} in a layer, {v['experts_per_token']} for each token"))
    if v["disk_bytes"] is not None:
        rows.append(("on disk", f"{human_bytes(v['disk_bytes'])} {v['format']} ({types})"))
    kind = {"auto": v["quantization"], "none": None}.get(v["quant"], v["quant"])
    how = f" where not {kind}" if kind else ""
    fits = "" if v["weights_fit"] else ": does NOT fit"
    return [
        *rows,
        ("weights in memory", f"{human_bytes(v['weights_bytes'])} as {v['dtype']}{how} on {v['device']}{fits}"),
        ("KV per token", f"{human_bytes(v['kv_bytes_per_token'])} as {v['kv_cache_dtype']}"),
        ("free memory", f"{human_bytes(v['free_memory_bytes'])}, of it for the KV cache {human_bytes(v['kv_cache_bytes'])}"),
        ("tokens that fit", ", ".join(tokens)),
        ("full-length sequences", f"{v['full_length_sequences']:,} at the same time"),
        ("users x context", contexts),
    ]
