"""Drafting heads with random weights, in the layouts in which heads are published, for the `tiny_llama` of 2 layers and 512 ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, DIM = 64, 96, 512, 4, 2, 16
IDS = torch.arange(3, 480, 3)  # what a reduced vocabulary holds
LAYER = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
    "model_type": "llama",
}


class Weights:
    """Random tensors, large enough that a wrong one shows."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self._generator) * 0.2

    def vector(self, size: int) -> torch.Tensor:
        return torch.rand(size, generator=self._generator) + 0.5

    def layer(self, prefix: str, inputs: int) -> dict[str, torch.Tensor]:
        matrices = {
            "self_attn.q_proj": (HEADS * DIM, inputs),
            "self_attn.k_proj": (KV_HEADS * DIM, inputs),
            "self_attn.v_proj": (KV_HEADS * DIM, inputs),
            "self_attn.o_proj": (HIDDEN, HEADS * DIM),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        named = {f"{prefix}{name}.weight": self.matrix(*shape) for name, shape in matrices.items()}
        return {**named, f"{prefix}post_attention_layernorm.weight": self.vector(HIDDEN)}


def eagle(w: Weights) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """EAGLE-1 and 2, SafeAILab's files."""
    tensors = {"fc.weight": w.matrix(HIDDEN, 2 * HIDDEN), "fc.bias": w.vector(HIDDEN), "embed_tokens.weight": w.matrix(VOCAB, HIDDEN)}
    return {**LAYER, "architectures": ["LlamaForCausalLM"]}, {**tensors, **w.layer("layers.0.", HIDDEN)}


def _eagle3(w: Weights, prefix: str) -> dict[str, torch.Tensor]:
    known = torch.zeros(VOCAB, dtype=torch.bool)
    known[IDS] = True
    return {
        "fc.weight": w.matrix(HIDDEN, 3 * HIDDEN),
        **w.layer(prefix, 2 * HIDDEN),
        f"{prefix}input_layernorm.weight": w.vector(HIDDEN),
        f"{prefix}hidden_norm.weight": w.vector(HIDDEN),
        "norm.weight": w.vector(HIDDEN),
        "lm_head.weight": w.matrix(len(IDS), HIDDEN),
        "d2t": IDS - torch.arange(len(IDS)),
        "t2d": known,
    }


def eagle3(w: Weights) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """EAGLE-3, SafeAILab's and SpecForge's files."""
    layers = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True}}
    config = {**LAYER, **layers, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": len(IDS)}
    return config, _eagle3(w, "midlayer.")


def speculators(w: Weights) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """EAGLE-3 in the `speculators` format: norm before residual by default, an embedding of its own."""
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": LAYER,
        "draft_vocab_size": len(IDS),
        "eagle_aux_hidden_state_layer_ids": [1, 0, 2],
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "tiny"}},
    }
    return config, {**_eagle3(w, "layers.0."), "embed_tokens.weight": w.matrix(VOCAB, HIDDEN)}


def medusa(w: Weights) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """FasterDecoding's files: three heads of two blocks."""
    tensors = {}
    for head in range(3):
        for block in range(2):
            tensors[f"{head}.{block}.linear.weight"] = w.matrix(HIDDEN, HIDDEN)
            tensors[f"{head}.{block}.linear.bias"] = w.vector(HIDDEN)
        tensors[f"{head}.2.weight"] = w.matrix(VOCAB, HIDDEN)
    return {"base_model_name_or_path": "tiny", "medusa_num_heads": 3, "medusa_num_layers": 2}, tensors


def medusa_vllm(w: Weights) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """vLLM's rewriting: a reduced vocabulary, no biases."""
    tensors = {"token_map": IDS}
    for head in range(3):
        tensors[f"blocks.{head}.layers.0.weight"] = w.matrix(HIDDEN, HIDDEN)
        tensors[f"lm_heads.{head}.weight"] = w.matrix(len(IDS), HIDDEN)
    config = {"model_type": "medusa", "architectures": ["MedusaModel"], "num_heads": 3, "num_hidden_layers": 1}
    return {**config, "hidden_size": HIDDEN, "vocab_size": VOCAB, "truncated_vocab_size": len(IDS)}, tensors


def redrafter(w: Weights) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Apple's files, with a projection before the output layers."""
    exit_size = 48
    tensors = {
        "input_proj.weight": w.matrix(exit_size, 2 * HIDDEN),
        "input_proj.bias": w.vector(exit_size),
        "rnn_u.weight": w.matrix(HIDDEN, HIDDEN),
        "rnn_u.bias": w.vector(HIDDEN),
        "rnn_w.weight": w.matrix(HIDDEN, HIDDEN),
        "lm_head.2.weight": w.matrix(VOCAB, exit_size),
    }
    for block in range(2):
        tensors |= {f"lm_head.{block}.linear.weight": w.matrix(exit_size, exit_size), f"lm_head.{block}.linear.bias": w.vector(exit_size)}
    config = {"model_type": "recurrent_drafting_drafter", "hidden_size": HIDDEN, "vocab_size": VOCAB, "num_draft_layers": 2, "rnn": True}
    return {**config, "exit_dim": exit_size}, tensors


LAYOUTS: dict[str, Callable[[Weights], tuple[dict[str, Any], dict[str, torch.Tensor]]]] = {
    "eagle": eagle,
    "eagle3": eagle3,
    "speculators": speculators,
    "medusa": medusa,
    "medusa, vLLM's": medusa_vllm,
    "redrafter": redrafter,
}


@pytest.fixture(scope="session")
def head_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each of `LAYOUTS`."""
    folders = {}
    for seed, (name, layout) in enumerate(LAYOUTS.items()):
        folders[name] = folder = tmp_path_factory.mktemp("head")
        config, tensors = layout(Weights(seed))
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    return folders
