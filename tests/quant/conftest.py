"""Tiny checkpoints in any of the formats of formats.py, each with the same model dequantised beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from formats import Format
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="session")
def plain(make_checkpoint: Callable[..., Path]) -> Path:
    """All of its matrices have sizes that every format can hold."""
    return make_checkpoint("llama", hidden_size=64, intermediate_size=192)


@pytest.fixture
def quantised(plain: Path, tmp_path: Path) -> Callable[[Format], tuple[Path, Path]]:
    """`quantised(format)` -> folder of the quantised model, folder of the same dequantised. The head and the embedding stay plain."""

    def make(form: Format) -> tuple[Path, Path]:
        folders = tmp_path / "quantised", tmp_path / "dense"
        state = load_file(plain / "model.safetensors")
        packed, dense = {}, {}
        rng = torch.Generator().manual_seed(1)
        for name, tensor in state.items():
            if not name.endswith("_proj.weight"):
                packed[name] = dense[name] = tensor
                continue
            parts, dense[name] = form.make(rng, *tensor.shape)
            packed |= {f"{name.removesuffix('.weight')}.{end}": part for end, part in parts.items()}
        for folder, tensors in zip(folders, (packed, dense), strict=True):
            shutil.copytree(plain, folder)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        config = json.loads((plain / "config.json").read_text())
        (folders[0] / "config.json").write_text(json.dumps({**config, "quantization_config": form.settings}))
        return folders

    return make
