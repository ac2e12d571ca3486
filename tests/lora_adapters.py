"""LoRA adapters as PEFT writes them, and what PEFT answers with them: the oracle of every test of adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_adapter(model: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A random adapter for the checkpoint in `model`, saved by PEFT: its B is not zero, so it changes what the model says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = {"r": 8, "lora_alpha": 16, "target_modules": ALL, "init_lora_weights": False, "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LoraConfig(**config))
    with torch.no_grad():  # large enough to be heard beside weights of 0.15
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and parameter.dim() == 2:
                parameter.normal_(0, 0.25)
    adapted.save_pretrained(folder)
    return folder


def greedy(model: Path, adapter: Path | None, prompts: Sequence[list[int]], tokens: int, *, merge: bool = False) -> list[list[int]]:
    """What transformers says with PEFT's adapter beside the weights in float32, or merged into them; the ids after each prompt."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    oracle: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is not None:
        oracle = PeftModel.from_pretrained(oracle, adapter)
        oracle = oracle.merge_and_unload() if merge else oracle
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        with torch.no_grad():
            out = oracle.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        answers.append(out[0, len(prompt) :].tolist())
    return answers
