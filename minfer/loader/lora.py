"""Reads a LoRA adapter as PEFT writes it: `adapter_config.json` beside `adapter_model.safetensors` (https://github.com/huggingface/peft).

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight   [r, K]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight   [N, r]      scale = lora_alpha / r, or / sqrt(r) (rsLoRA)

What PEFT can do beyond that changes the sum: DoRA normalises it, PiSSA and its like take a part out of W first, `modules_to_save` replaces
whole matrices. Applied as plain LoRA such an adapter would answer, and wrongly, so each is refused by name. Whether the matrices fit is
known where the model is: `layers/lora.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from minfer.errors import ModelLoadError
from minfer.loader import hub
from minfer.loader.hf_config import read_json
from minfer.loader.resolve import REPO

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK, MAX_ALPHA = 512, 10**6
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Fields of adapter_config.json that change what is computed, and the values with which they don't.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    # Others begin by changing the base weights: PiSSA, OLoRA, CorDA, LoftQ.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}
_HARMLESS = ("use_rslora", "eva_config")


@dataclass(frozen=True)
class LoraCheckpoint:
    """An adapter by the names of the matrices it changes: `model.layers.0.self_attn.q_proj` -> A [r, K], B [N, r]."""

    name: str
    folder: Path
    rank: int
    scale: float
    matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def read_lora(name: str, source: str) -> LoraCheckpoint:
    """The adapter called `name`, from a folder or a hub id. Raises ModelLoadError for what can't be read, or isn't plain LoRA."""
    folder = _folder(name, source)
    try:
        rank, scale = _settings(read_json(folder / CONFIG))
        return LoraCheckpoint(name, folder, rank, scale, _matrices(_tensors(folder / WEIGHTS), rank))
    except ModelLoadError as error:
        raise ModelLoadError(f"the LoRA adapter {name!r} in {folder}: {error}") from error


def _folder(name: str, source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not REPO.fullmatch(source):
        raise ModelLoadError(f"the LoRA adapter {name!r}: there is no folder {source!r}, and it is no hub id (org/name)")
    cached = hub.cached_folder(source)
    if cached is not None and all((cached / file).is_file() for file in (CONFIG, WEIGHTS)):
        return cached
    return hub.download(source, None, [CONFIG, WEIGHTS])


def _settings(config: Mapping[str, Any]) -> tuple[int, float]:
    """(rank, scale)"""
    if config.get("peft_type") != "LORA":
        raise ModelLoadError(f"its peft_type is {config.get('peft_type')!r}, and only LORA is supported")
    for field, harmless in _REFUSED.items():
        value = config.get(field)
        if value not in harmless:
            raise ModelLoadError(f"{field}={value!r} in {CONFIG} is not supported")
    for field, value in config.items():
        variant = field.startswith("use_") or field.endswith("_config")  # use_dora, kasa_config and what comes after them
        if variant and field not in _HARMLESS and value:
            raise ModelLoadError(f"{field}={value!r} in {CONFIG} is not supported")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise ModelLoadError(f"r in {CONFIG} must be a whole number from 1 to {MAX_RANK}, not {rank!r}")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not abs(alpha) <= MAX_ALPHA:
        raise ModelLoadError(f"lora_alpha in {CONFIG} must be a number up to {MAX_ALPHA}, not {str(alpha)[:40]}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    if not file.is_file():
        pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in file.parent.glob(pattern))
        more = f", only pickled weights ({pickled[0]}), which minfer never loads; convert them to safetensors" if pickled else ""
        raise ModelLoadError(f"it has no {file.name}{more}")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"{file.name} is not a sound safetensors file: {error}") from error


def _matrices(tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise ModelLoadError(f"its tensor {name!r} is not supported: it is no lora_A or lora_B of a linear layer")
        place, shape = "AB".index(match[2]), tuple(tensor.shape)
        if tensor.dtype not in _FLOATS or len(shape) != 2 or shape[place] != rank:
            raise ModelLoadError(
                f"its tensor {name!r} is {list(shape)} of {tensor.dtype}, which is no such matrix of floats of rank {rank}"
            )
        if not bool(tensor.isfinite().all()):
            raise ModelLoadError(f"its tensor {name!r} holds numbers that are not finite; the file is damaged")
        found.setdefault(match[1], {})[match[2]] = tensor
    for module, pair in found.items():
        if len(pair) != 2:
            raise ModelLoadError(f"{module} has a lora_{next(iter(pair))} without its other half")
    if not found:
        raise ModelLoadError("it holds no matrices")
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}
