"""From an `EngineConfig` to a model ready to run: find, open, choose kernels, read weights, size the KV cache.

Every phase is timed, because "what takes so long?" is the first question of anyone who waits for a server to start.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minfer.config import CALIBRATED, EngineConfig
from minfer.errors import ConfigError
from minfer.kernels import Ops, select_ops
from minfer.kernels.cpu.arena import ask_for_huge_pages, return_free_memory
from minfer.kvcache import FORMATS, KVCache, format_of
from minfer.layers.loading import load_weights
from minfer.layers.lora import add_adapters
from minfer.loader import Checkpoint, open_checkpoint, quantised_twin, quantized_as_asked, resolve_model
from minfer.loader.check import Named, finite
from minfer.loader.heads import is_head
from minfer.loader.lora import read_lora
from minfer.model_config import ModelConfig
from minfer.models import Model, create_model
from minfer.quant import PackedWeight
from minfer.runner.load_head import DraftHead, load_head
from minfer.runner.memory import GIB, num_kv_blocks

logger = logging.getLogger("minfer.load")

TIDY_AFTER = 128 << 20  # bytes of weights read; tidying up takes a few milliseconds


class PhaseTimer:
    """`with phases("read weights"):` announces the phase and remembers its seconds."""

    def __init__(self, on_phase: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._on_phase = on_phase

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._on_phase(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@dataclass(frozen=True)
class DraftModel:
    """The smaller model of `--speculative draft`, and its KV in blocks numbered like the target's."""

    model: Model
    cache: KVCache


@dataclass(frozen=True)
class LoadedModel:
    """`config` is the user's with every `auto` and None that loading decides filled in."""

    config: EngineConfig
    model_config: ModelConfig
    checkpoint: Checkpoint
    model: Model
    ops: Ops
    cache: KVCache
    device: torch.device
    phases: PhaseTimer
    draft: DraftModel | DraftHead | None = None

    @property
    def max_model_len(self) -> int:
        assert self.config.max_model_len is not None, "load_model resolves it"
        return self.config.max_model_len


def load_model(config: EngineConfig, on_phase: Callable[[str], None] = lambda name: None) -> LoadedModel:
    """Raises ModelLoadError, ConfigError or CapacityError, each before more work is done than was needed to know.

    `on_phase` is told the name of each phase as it begins.
    """
    phases = PhaseTimer(on_phase)
    with phases("resolve"):
        name = quantised_twin(config.model, config.quant) if config.quant in CALIBRATED and config.load_format != "dummy" else config.model
        checkpoint = open_checkpoint(resolve_model(name, revision=config.revision, load_format=config.load_format))
        model_config = checkpoint.config
        device = pick_device(config)
        dtype = pick_dtype(config, checkpoint, device)
        max_len = pick_max_len(config, model_config)
        kv_dtype = pick_kv_dtype(config, dtype)
        ops = select_ops(device, dtype, config.backend, config.threads, config.activations, config.attention_backend)
        ops.check_kv_cache(format_of(kv_dtype).name, model_config.head_dim, config.block_size)
        format_of(kv_dtype).width(model_config.head_dim)  # raises where heads of this size can't be stored so
        checkpoint = quantized_as_asked(checkpoint, config.quant, on_phase)
    with phases("read weights"), torch.inference_mode():
        model = create_model(model_config, ops, max_len, device)
        tensors = finite(checkpoint.tensors(keep_packed=config.quant != "none"), checkpoint.tensor_infos)
        load_weights(model, _tidied(tensors))
    if config.lora is not None:
        with phases("read adapters"), torch.inference_mode():
            add_adapters(model, [read_lora(name, source) for name, source in config.lora.items()])
    draft: Model | DraftHead | None = None
    if config.draft_model is not None:
        with phases("read draft model"), torch.inference_mode():
            rounded = checkpoint.quantization is not None and config.quant != "none"
            draft = _read_draft(config, config.draft_model, model_config, ops, max_len, device, rounded)
    with phases("size KV cache"):
        drafted = draft.cached if isinstance(draft, DraftHead) else draft.config if draft is not None else None
        if drafted is not None:
            ops.check_kv_cache(format_of(kv_dtype).name, drafted.head_dim, config.block_size)
        blocks = num_kv_blocks(config, model_config, max_len, kv_dtype, device, drafted)
        cache = _kv_cache(model_config, blocks, config.block_size, kv_dtype, device)
        drafting: DraftModel | DraftHead | None = None
        if isinstance(draft, DraftHead):
            drafting = draft.with_cache(blocks, config.block_size, kv_dtype, device)
        elif draft is not None:
            drafting = DraftModel(draft, _kv_cache(draft.config, blocks, config.block_size, kv_dtype, device))
    names: dict[str, Any] = {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "kv_cache_dtype": format_of(kv_dtype).name}
    resolved = dataclasses.replace(config, max_model_len=max_len, **names)
    logger.info("loaded %s: %s", config.model, ", ".join(f"{name} {seconds:.2f} s" for name, seconds in phases.seconds.items()))
    logger.info("KV cache: %s", describe_kv_cache(cache, model_config))
    return LoadedModel(resolved, model_config, checkpoint, model, ops, cache, device, phases, drafting)


def _tidied(tensors: Iterable[Named]) -> Iterator[Named]:
    """The same tensors; what was left of those before is given back now and then, so that memory peaks little above the model."""
    taken = 0
    for name, tensor in tensors:
        taken += (tensor.codes if isinstance(tensor, PackedWeight) else tensor).nbytes
        yield name, tensor
        del tensor  # or it would still be there when the next one is read
        if taken > TIDY_AFTER:
            taken = 0
            return_free_memory()
    return_free_memory()


def _kv_cache(model: ModelConfig, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    cache = KVCache(model, blocks, block_size, dtype, device)
    if device.type == "cpu":
        for layer in cache.layers:
            for tensor in layer.tensors:
                ask_for_huge_pages(tensor)
    return cache


def _read_draft(
    config: EngineConfig, name: str, target: ModelConfig, ops: Ops, max_len: int, device: torch.device, rounded: bool
) -> Model | DraftHead:
    """A model or, as its config tells, a head, which is rounded where the target is.

    Raises ConfigError where its tokens are others than the target's, or it can't go as far.
    """
    if Path(name).expanduser().is_dir() and is_head(Path(name).expanduser()):
        after = None if config.draft_states is None else tuple(int(n) for n in config.draft_states.split(","))
        return load_head(Path(name).expanduser(), target, ops, max_len, device, after, rounded=rounded)
    if config.draft_states is not None:
        raise ConfigError(f"draft_states names layers for an EAGLE-3 head, but draft_model {name} is a whole model")
    checkpoint = open_checkpoint(resolve_model(name, load_format=config.load_format))
    own = checkpoint.config
    if own.vocab_size != target.vocab_size:
        raise ConfigError(
            f"draft_model {name} has a vocabulary of {own.vocab_size} tokens and the model one of {target.vocab_size}; "
            "take a smaller model of the same family"
        )
    longest = pick_max_len(dataclasses.replace(config, max_model_len=None), own)
    if longest < max_len:
        raise ConfigError(f"draft_model {name} was made for {longest} tokens; set --max-model-len {longest} or less")
    model = create_model(own, ops, max_len, device)
    load_weights(model, finite(checkpoint.tensors(keep_packed=config.quant != "none"), checkpoint.tensor_infos))
    return model


def pick_device(config: EngineConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but torch sees no CUDA or ROCm device; use --device cpu")
    return torch.device(config.device)


def pick_dtype(config: EngineConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The checkpoint's own type where `auto`; a quantised file declares none that matters, and gets bfloat16."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    declared = "bfloat16" if checkpoint.quantization else checkpoint.config.dtype
    return {"float16": torch.float16, "float32": torch.float32}.get(declared, torch.bfloat16)


def pick_kv_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """The element type of the KV cache; the model's own where `auto`."""
    return dtype if config.kv_cache_dtype == "auto" else FORMATS[config.kv_cache_dtype].dtype


def describe_kv_cache(cache: KVCache, model: ModelConfig) -> str:
    """For a start-up line: `55,296 tokens in int8, 1.1 GiB`."""
    tokens = cache.num_blocks * cache.block_size
    total = tokens * KVCache.token_bytes(model, cache.dtype)
    return f"{tokens:,} tokens in {format_of(cache.dtype).name}, {total / GIB:.2f} GiB"


def pick_max_len(config: EngineConfig, model: ModelConfig) -> int:
    trained = model.max_position_embeddings
    if model.rope.kind in ("linear", "dynamic") and model.rope.original_max_position == trained:
        trained = int(trained * model.rope.factor)  # old configs give the length before scaling
    if config.max_model_len is None:
        return trained
    if config.max_model_len > trained:
        raise ConfigError(f"max_model_len={config.max_model_len} is more than the {trained} tokens this model was made for")
    return config.max_model_len
