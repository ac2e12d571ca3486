"""An `Engine` over a simulated GPU (`kernels/simulated.py`): loop, scheduler and text are the real ones, the model is its shapes.

Weights and KV cache are torch's "meta" tensors, so a 7B model takes no memory and loads at once.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch

from minfer.config import EngineConfig
from minfer.engine.engine import Engine
from minfer.engine.input_processor import InputProcessor
from minfer.engine.output_processor import OutputProcessor
from minfer.errors import ConfigError
from minfer.kernels import Ops
from minfer.kernels.simulated import ELEMENTS, Gpu, SimulatedBackend, SimulatedDevice
from minfer.kvcache import KVCache
from minfer.layers.loading import load_weights
from minfer.loader import open_checkpoint, resolve_model
from minfer.model_config import ModelConfig
from minfer.models import create_model
from minfer.runner import BatchBuilder, LoadedModel
from minfer.runner.buckets import Buckets
from minfer.runner.decode_graphs import DecodeGraphs
from minfer.runner.load import PhaseTimer, pick_max_len
from minfer.tokenizer import Tokenizer

_META, _HOST = torch.device("meta"), torch.device("cpu")
_MEMORY_SHARE = 0.9
_WORDS = 64


def simulated_engine(config: EngineConfig, gpu: Gpu, element: str, tokenizer: Tokenizer | None = None) -> tuple[Engine, SimulatedDevice]:
    """`element` is that of the matrices: bf16, fp8 or int4. Tokens are random words that `tokenizer` knows,
    among which n-gram drafts are found, and nearly always wrong.

    Raises ConfigError where the model doesn't fit the GPU, or the config asks for what can't be simulated.
    """
    if config.speculative not in ("none", "ngram"):
        raise ConfigError("only n-gram drafts can be simulated: others take a second model")
    if config.lora is not None:
        raise ConfigError("LoRA adapters can't be simulated yet; leave lora out")
    checkpoint = open_checkpoint(resolve_model(config.model, revision=config.revision, load_format="dummy"))
    model_config = checkpoint.config
    max_len = pick_max_len(config, model_config)
    vocab = model_config.vocab_size
    device = SimulatedDevice(gpu)
    backend = SimulatedBackend(device, element, vocab, _words(vocab, tokenizer))
    ops = Ops([backend], torch.bfloat16)
    with torch.inference_mode():
        model = create_model(model_config, ops, max_len, _META)
        load_weights(
            model, ((name, torch.empty(shape, dtype=torch.bfloat16, device=_META)) for name, shape in model_config.tensor_shapes())
        )
    blocks = _num_blocks(config, model_config, max_len, gpu, element)
    cache = KVCache(model_config, blocks, config.block_size, torch.bfloat16, _META)
    names: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "kv_cache_dtype": "bf16", "max_model_len": max_len}
    if config.forced_tokens == "auto" and config.graphs:
        names["forced_tokens"] = "off"  # as on a GPU, whose graphs take few tokens of each request
    resolved = dataclasses.replace(config, **names)
    engine = Engine(LoadedModel(resolved, model_config, checkpoint, model, ops, cache, _HOST, PhaseTimer(lambda name: None)), None)
    # The tokenizer may be another model's, and know fewer ids; nobody masks the others' logits here, so it isn't the engine's own.
    ends = model_config.eos_token_ids if tokenizer is None else ()
    engine.inputs = InputProcessor(resolved, dataclasses.replace(model_config, eos_token_ids=ends), tokenizer)
    engine.outputs = OutputProcessor(tokenizer)
    sizes = (config.max_num_batched_tokens, config.max_num_seqs, max_len, config.block_size)
    buckets = Buckets.of(config)
    engine.core.runner.builder = BatchBuilder(*sizes, _HOST, buckets=buckets if config.graphs else None, copy=device.copy)
    if config.graphs:
        engine.core.runner.graph = DecodeGraphs(
            lambda batch: model.forward_states(batch, cache, ()), device.record, most_tokens=buckets.most_tokens
        )
    return engine, device


def _words(vocab_size: int, tokenizer: Tokenizer | None) -> list[int]:
    """A few ids; where there is a tokenizer, of words in plain letters, so that grammars can be asked for that allow them."""
    rng, words = random.Random(0), set[int]()
    known = vocab_size if tokenizer is None else min(vocab_size, tokenizer.vocab_size)
    for token in rng.sample(range(known), known):
        text = "word" if tokenizer is None else tokenizer.token_text(token).strip()
        if text.isascii() and text.isalpha():
            words.add(token)
        if len(words) == _WORDS:
            break
    return sorted(words)


def _num_blocks(config: EngineConfig, model: ModelConfig, max_len: int, gpu: Gpu, element: str) -> int:
    sizes = ((shape, torch.Size(shape).numel()) for _, shape in model.tensor_shapes())
    bits = sum(count * (16 if len(shape) == 1 or shape[0] == model.vocab_size else ELEMENTS[element][0]) for shape, count in sizes)
    block_bytes = KVCache.block_bytes(model, config.block_size, torch.bfloat16)
    per_sequence = -(-max_len // config.block_size)
    blocks = min(int(_MEMORY_SHARE * (gpu.memory - bits / 8)) // block_bytes, per_sequence * config.max_num_seqs)
    if blocks < per_sequence:
        raise ConfigError(
            f"{config.model} with a sequence of {max_len} tokens doesn't fit the memory of one {gpu.name}; lower --max-model-len"
        )
    return blocks
