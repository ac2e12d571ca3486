"""The folder that a quantised checkpoint is written into, piece by piece, so that an interrupted run goes on where it stopped.

    OUT/.unfinished/run.json                   what is being made; another recipe or model is refused
    OUT/.unfinished/calibration.json           the samples, where the model made them itself
    OUT/.unfinished/layer-00007.safetensors    each layer as it will be in the checkpoint; a file appears whole or not at all
    OUT/model-00001-of-00002.safetensors ...   made of those at the end, with the index, the tokenizer and, last, config.json

A folder without config.json is no checkpoint to anyone, so a half-written one is never loaded by mistake.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from minfer.errors import ConfigError, ModelLoadError
from minfer.loader import Checkpoint
from minfer.loader.hf_config import folder_config, read_json
from minfer.model_config import ModelConfig, RopeConfig
from minfer.tokenizer.write import write_tokenizer

SHARD_BYTES = 2 * 2**30
Tensors = Mapping[str, torch.Tensor]


class OutputFolder:
    """Raises ConfigError if `path` holds a finished checkpoint, or an unfinished one of another `run`."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path = path
        self._work = path / ".unfinished"
        if (path / "config.json").exists():
            raise ConfigError(f"{path} holds a model already; give another folder, or remove it")
        self._work.mkdir(parents=True, exist_ok=True)
        note = self._work / "run.json"
        if note.exists() and read_json(note) != json.loads(json.dumps(run)):
            raise ConfigError(f"{path} holds the beginning of another run; give another folder, or remove {self._work}")
        _write_whole(note, json.dumps(run, indent=2))

    def saved_calibration(self) -> list[list[int]] | None:
        file = self._work / "calibration.json"
        return read_json(file)["samples"] if file.exists() else None

    def save_calibration(self, samples: list[list[int]]) -> None:
        _write_whole(self._work / "calibration.json", json.dumps({"samples": samples}))

    def load(self, piece: str) -> dict[str, torch.Tensor] | None:
        """A piece of an earlier run; None if it isn't there, or isn't whole."""
        file = self._work / f"{piece}.safetensors"
        if not file.exists():
            return None
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError):  # a machine that lost power: made again
            return None

    def save(self, piece: str, tensors: Tensors) -> None:
        file = self._work / f"{piece}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, f"{file}.part", metadata={"format": "pt"})
        os.replace(f"{file}.part", file)

    def finish(self, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
        """Joins the pieces into shards and writes what stands beside them. The folder is a checkpoint from here on."""
        groups = _shards(sorted(self._work.glob("*.safetensors")))
        weight_map: dict[str, str] = {}
        for n, files in enumerate(groups, 1):
            name = "model.safetensors" if len(groups) == 1 else f"model-{n:05d}-of-{len(groups):05d}.safetensors"
            tensors = {key: tensor for file in files for key, tensor in load_file(file).items()}
            save_file(tensors, self.path / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        if len(groups) > 1:
            size = sum((self.path / name).stat().st_size for name in set(weight_map.values()))
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (self.path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        if checkpoint.tokenizer_source is not None:
            write_tokenizer(checkpoint.tokenizer_source, self.path)
        config, generation = _configs(checkpoint)
        (self.path / "generation_config.json").write_text(json.dumps(generation, indent=2))
        _write_whole(self.path / "config.json", json.dumps({**config, "quantization_config": dict(settings)}, indent=2))
        shutil.rmtree(self._work)


def _shards(pieces: list[Path]) -> list[list[Path]]:
    """Whole pieces together up to SHARD_BYTES, the rest (embedding, head) before the layers."""
    groups: list[list[Path]] = []
    room = 0
    for piece in sorted(pieces, key=lambda file: (file.name.startswith("layer-"), file.name)):
        size = piece.stat().st_size
        if size > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(piece)
        room -= size
    return groups


def _write_whole(file: Path, text: str) -> None:
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def _configs(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json: a folder's own, otherwise written anew from what minfer knows of the model."""
    source, model = checkpoint.source, checkpoint.config
    if source.kind == "folder" and source.path is not None:
        config, generation = folder_config(source.path)
        return {**config, "tie_word_embeddings": model.tie_word_embeddings}, generation or _generation(model)
    return hf_config(model), _generation(model)


def _generation(model: ModelConfig) -> dict[str, Any]:
    return {"bos_token_id": model.bos_token_id, "eos_token_id": list(model.eos_token_ids)}


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """A `config.json` for a model that came without one (GGUF). Raises ModelLoadError for what Hugging Face's can't say."""
    if model.moe is not None:
        raise ModelLoadError("a GGUF model with experts can't be written as a Hugging Face config; quantise its folder")
    windows = set(model.sliding_windows)
    if len(windows) > 1 or (windows and model.architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")):
        raise ModelLoadError(
            "a GGUF model with sliding windows in some layers can't be written as a Hugging Face config; quantise its folder"
        )
    return {
        "architectures": [model.architecture],
        "model_type": model.architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "hidden_act": model.hidden_act,
        **_rope(model.rope),
        "sliding_window": next(iter(windows), None),
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
        "torch_dtype": model.dtype,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": list(model.eos_token_ids),
    }


def _rope(rope: RopeConfig) -> dict[str, Any]:
    if rope.freq_factors is not None:
        raise ModelLoadError("a GGUF file that brings its rotary frequencies as a tensor has no Hugging Face config; quantise its folder")
    if rope.kind == "default":
        return {"rope_theta": rope.theta}
    scaling: dict[str, Any] = {
        "rope_type": rope.kind,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position,
    }
    if rope.kind == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "attention_factor": rope.attention_factor}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
