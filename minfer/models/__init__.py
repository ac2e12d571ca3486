"""Model families: one file each, found by the architecture a checkpoint names."""

from __future__ import annotations

import torch

from minfer.errors import ModelLoadError
from minfer.kernels import Ops
from minfer.model_config import ModelConfig
from minfer.models.llama import FINAL, LlamaForCausalLM

__all__ = ["FINAL", "Model", "create_model"]

Model = LlamaForCausalLM  # widens to a protocol with the second family

_FAMILIES = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": LlamaForCausalLM,
    "MixtralForCausalLM": LlamaForCausalLM,
    "Qwen2ForCausalLM": LlamaForCausalLM,
    "Qwen2MoeForCausalLM": LlamaForCausalLM,
    "Qwen3ForCausalLM": LlamaForCausalLM,
    "Qwen3MoeForCausalLM": LlamaForCausalLM,
}


def create_model(config: ModelConfig, ops: Ops, max_len: int, device: torch.device) -> Model:
    """The model without its weights (`layers.loading.load_weights` brings them)."""
    family = _FAMILIES.get(config.architecture)
    if family is None:
        raise ModelLoadError(f"architecture {config.architecture!r} is not supported yet; supported are {', '.join(_FAMILIES)}")
    return family(config, ops, max_len, device)
