"""Reads the JSON files of a Hugging Face folder, and turns whatever is wrong in them into an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minfer.errors import ModelLoadError
from minfer.model_config import ModelConfig

MAX_LAYERS = 10_000
MAX_JSON_BYTES = 100 * 2**20  # the index of the largest public models is about 10 MB


def read_json(path: Path) -> dict[str, Any]:
    """The file's top-level object; raises `ModelLoadError` when it is absent, too large, not JSON or not an object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelLoadError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, which no such file needs")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelLoadError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def build_config(config: Mapping[str, Any], where: Path | str, generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """`ModelConfig.from_hf`, with errors that say where the config came from."""
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:  # per-layer settings are expanded into tuples
        raise ModelLoadError(f"{where}: num_hidden_layers={layers} is beyond any model")
    try:
        return ModelConfig.from_hf(config, generation)
    except ModelLoadError as error:
        raise ModelLoadError(f"{where}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise ModelLoadError(f"{where}: a value in the config is of the wrong kind ({error})") from error


def folder_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`config.json` and, where there is one, `generation_config.json`."""
    generation = folder / "generation_config.json"
    return read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None
