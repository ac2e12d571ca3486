"""Writes a trained head as its kind is published, so that whoever reads the published ones reads ours.

eagle3      SafeAILab's: config.json of one Llama layer; fc, midlayer.*, norm, lm_head, d2t (target id = i + d2t[i]), t2d
medusa      vLLM's: blocks.*, lm_heads.*, token_map for the reduced vocabulary
redrafter   Apple's: input_proj, rnn_w, rnn_u, lm_head.*; and, as theirs has no reduced vocabulary, EAGLE-3's d2t
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minfer.errors import ConfigError
from minfer.model_config import ModelConfig
from minfer.training.head import Head


def publish(head: Head, kind: str, after: Sequence[int], folder: Path, acceptance: Sequence[float], model: str) -> None:
    """`acceptance[i]`: the share of held-out positions at which the first i + 1 guesses were right."""
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in head.state_dict().items()}
    if kind == "medusa":
        tensors["token_map"] = head.vocabulary
    else:
        tensors["d2t"] = head.vocabulary - torch.arange(len(head.vocabulary))
    if kind == "eagle3":
        known = torch.zeros(head.config.vocab_size, dtype=torch.bool)
        known[head.vocabulary] = True
        tensors["t2d"] = known
    config = {**_CONFIGS[kind](head.config, len(head.vocabulary), head.depth, list(after)), "torch_dtype": "bfloat16"}
    config["minfer"] = {"target": model, "held_out_acceptance": [round(share, 4) for share in acceptance]}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "model.safetensors.tmp"
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_published(folder: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What `publish` wrote: the head's own tensors, float32, and its vocabulary [Vd]. Raises ConfigError where that isn't there."""
    file = folder / "model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder} holds no head to start from: {file.name} can't be read ({error})") from error
    tensors.pop("t2d", None)
    if "token_map" in tensors:
        vocabulary = tensors.pop("token_map")
    elif "d2t" in tensors:
        offsets = tensors.pop("d2t")
        vocabulary = offsets + torch.arange(len(offsets))
    else:
        raise ConfigError(f"{file} has neither d2t nor token_map, so it can't be told which tokens its head guesses")
    return {name: tensor.float() for name, tensor in tensors.items()}, vocabulary


def _eagle3(config: ModelConfig, vocabulary: int, depth: int, after: list[int]) -> dict[str, Any]:
    rope = config.rope
    scaling = None
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind, "factor": rope.factor, "original_max_position_embeddings": rope.original_max_position}
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor} if rope.kind == "llama3" else {}
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": after},
    }


def _medusa(config: ModelConfig, vocabulary: int, depth: int, after: list[int]) -> dict[str, Any]:
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "truncated_vocab_size": vocabulary,
        "num_heads": depth,
        "num_hidden_layers": 1,
        "medusa_fc_bias": True,
    }


def _redrafter(config: ModelConfig, vocabulary: int, depth: int, after: list[int]) -> dict[str, Any]:
    return {
        "model_type": "recurrent_drafting_drafter",
        "hidden_size": config.hidden_size,
        "exit_dim": config.hidden_size,
        "num_draft_layers": 1,
        "vocab_size": vocabulary,
        "rnn": True,
    }


_CONFIGS = {"eagle3": _eagle3, "medusa": _medusa, "redrafter": _redrafter}
