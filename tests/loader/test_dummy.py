from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minfer.loader import ModelSource, open_checkpoint, resolve_model
from minfer.loader.dummy import DummyCheckpoint


def test_weights_have_the_shape_scale_and_dtype(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("qwen2", torch.float16, hidden_size=256, intermediate_size=2048, vocab_size=5000)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(resolve_model(str(tmp_path), load_format="dummy"))
    expected = model.state_dict()
    loaded = dict(checkpoint.tensors())
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, torch.float16)
        if name.endswith("norm.weight"):
            assert bool((tensor == 1).all())
    embedding = loaded["model.embed_tokens.weight"].float()  # longer than the pool
    assert abs(embedding.std().item() - 0.02) < 1e-3
    assert abs(embedding.mean().item()) < 1e-3
    assert len(embedding.unique(dim=0)) == len(embedding)
    assert checkpoint.describe().num_bytes == sum(t.nbytes for t in loaded.values())
    assert checkpoint.tokenizer_source is None  # the folder holds a config and nothing else


def test_seeds() -> None:
    source = resolve_model("smollm2-135m", load_format="dummy")
    name = "model.layers.3.mlp.up_proj.weight"
    first, again, other = DummyCheckpoint(source), DummyCheckpoint(source), DummyCheckpoint(source, seed=1)
    assert torch.equal(first.read(name), again.read(name))
    assert not torch.equal(first.read(name), other.read(name))
    assert not torch.equal(first.read(name), first.read("model.layers.4.mlp.up_proj.weight"))


def test_activations_stay_finite() -> None:
    """transformers runs the weights: thirty layers deep nothing overflows or dies."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = resolve_model("smollm2-135m", load_format="dummy")
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in source.config.items() if k != "architectures"}))
    model.load_state_dict(dict(open_checkpoint(source).tensors()), strict=False)
    with torch.inference_mode():
        logits = model(torch.arange(16)[None]).logits.float()
    assert bool(logits.isfinite().all())
    assert 0.01 < logits.std().item() < 100


def test_the_shape_of_a_gguf_file(gguf_shaped: Callable[..., Path]) -> None:
    path = gguf_shaped()
    dummy = open_checkpoint(ModelSource(kind="dummy", name="x", path=path))
    real = open_checkpoint(ModelSource(kind="gguf", name="x", path=path))
    assert dummy.config == real.config
    assert {n: t.shape for n, t in dummy.tensors()} == {n: t.shape for n, t in real.tensors()}
    assert dummy.tokenizer_source == real.tokenizer_source
