"""Logits against transformers: float32, tiny random models, every config switch that `ModelConfig` claims to read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minfer.config import EngineConfig
from minfer.runner import BatchBuilder, LoadedModel, ModelRunner, RowSpan, load_model

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, multi-head": ("llama", {"num_key_value_heads": 4}),
    "llama, multi-query": ("llama", {"num_key_value_heads": 1}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, attention bias": ("llama", {"attention_bias": True}),
    "llama, mlp bias": ("llama", {"mlp_bias": True}),
    "llama, own head_dim": ("llama", {"head_dim": 32}),
    "llama, 9 and 3 heads": ("llama", {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama, eps and theta": ("llama", {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    "rope linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}}),
    "rope dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "rope llama3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "rope yarn": ("llama", {"rope_parameters": YARN}),
    "rope yarn, mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 20.0}}),
    "rope yarn, attention factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "rope yarn, not truncated": ("llama", {"rope_parameters": {**YARN, "truncate": False}}),
    "mistral, sliding window": ("mistral", {"sliding_window": 7}),
    "mistral, window of a block": ("mistral", {"sliding_window": 16}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, window from layer 1": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2, tied head": ("qwen2", {"tie_word_embeddings": True}),
}
PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(45)]


def load(folder: Path, **settings: Any) -> LoadedModel:
    options = {"dtype": "float32", "device": "cpu", "backend": "reference", "max_model_len": 512, "kv_cache_memory": 2**23}
    return load_model(EngineConfig(model=str(folder), **{**options, **settings}))


class Row:
    def __init__(self, tokens: list[int], blocks: list[int]) -> None:
        self.token_ids = tokens
        self.blocks = blocks


def logits_of(loaded: LoadedModel, tokens: list[int], chunks: list[int]) -> torch.Tensor:
    """All positions' logits, the tokens computed in the given chunks, over blocks in scrambled order."""
    size = loaded.config.block_size
    count = -(-len(tokens) // size)
    row = Row(tokens, [(5 * i + 3) % loaded.cache.num_blocks for i in range(count)])
    runner = ModelRunner(loaded.model, loaded.cache, BatchBuilder(512, 4, loaded.max_model_len, size, loaded.device))
    parts, start = [], 0
    for chunk in chunks:
        parts.append(runner.logits(runner.run([RowSpan(row, start, chunk, chunk)])).clone())
        start += chunk
    return torch.cat(parts)


def transformers_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, backend: str, make_checkpoint: Callable[..., Path]) -> None:
    family, settings = CASES[case]
    folder = make_checkpoint(family, **settings)
    expected = transformers_logits(folder, PROMPT)
    assert expected.std() > 0.5, "flat logits would hide a difference"
    loaded = load(folder, backend=backend)
    for chunks in ([45], [1] * 45, [16, 1, 15, 13]):
        assert (logits_of(loaded, PROMPT, chunks) - expected).abs().max() <= 1e-4


def test_dynamic_rope_equals_transformers_at_the_longest_sequence(make_checkpoint: Callable[..., Path]) -> None:
    """Beyond the trained length, dynamic NTK depends on the length; minfer fixes it for the longest sequence it admits."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    folder = make_checkpoint("llama", max_position_embeddings=32, rope_parameters=rope)
    loaded = load(folder, max_model_len=45)
    assert (logits_of(loaded, PROMPT, [45]) - transformers_logits(folder, PROMPT)).abs().max() <= 1e-4


@pytest.mark.parametrize("old_spelling", [False, True])
def test_old_and_new_spellings_of_the_config_mean_the_same(old_spelling: bool, make_checkpoint: Callable[..., Path]) -> None:
    """transformers 4 wrote rope_theta, rope_scaling and torch_dtype where 5 writes rope_parameters and dtype."""
    import json

    folder = make_checkpoint("llama", rope_parameters={**LLAMA3, "original_max_position_embeddings": 64})
    expected = transformers_logits(folder, PROMPT)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    assert "rope_parameters" in config
    if old_spelling:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        config["torch_dtype"] = config.pop("dtype")
        file.write_text(json.dumps(config))
    loaded = load(folder, dtype="auto")
    assert loaded.config.dtype == "float32"
    assert (logits_of(loaded, PROMPT, [45]) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype: str, tiny_llama: Path) -> None:
    expected = transformers_logits(tiny_llama, PROMPT)
    actual = logits_of(load(tiny_llama, dtype=dtype), PROMPT, [30, 15])
    assert torch.nn.functional.cosine_similarity(actual, expected).min() > 0.99


def test_a_request_reads_only_its_own_blocks(tiny_llama: Path) -> None:
    """Two sequences of different length in one batch, each token by token, beside stale blocks full of NaN."""
    loaded = load(tiny_llama)
    for layer in loaded.cache.layers:
        layer.k.fill_(float("nan"))
        layer.v.fill_(float("nan"))
    long, short = Row(PROMPT, [9, 2, 30]), Row(PROMPT[20:40], [7, 11])
    runner = ModelRunner(loaded.model, loaded.cache, BatchBuilder(512, 4, 512, 16, loaded.device))
    runner.run([RowSpan(long, 0, 44, 0), RowSpan(short, 0, 19, 0)])
    both = runner.logits(runner.run([RowSpan(long, 44, 1, 1), RowSpan(short, 19, 1, 1)]))
    for row, logits in ((long, both[0]), (short, both[1])):
        alone = transformers_logits(tiny_llama, row.token_ids)[-1]
        assert (logits - alone).abs().max() <= 1e-4
