"""Adapters as PEFT writes them are read; what PEFT can do beyond plain LoRA, and what is damaged, is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_adapters import write_adapter
from safetensors.torch import load_file, save_file

from minfer import LLM
from minfer.errors import ModelLoadError
from minfer.loader.lora import CONFIG, WEIGHTS, read_lora

Q = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tiny_llama, tmp_path_factory.mktemp("adapter"), r=4, lora_alpha=6)


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


def set_config(folder: Path, **values: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def set_tensors(folder: Path, **values: torch.Tensor | None) -> None:
    tensors = {**load_file(folder / WEIGHTS), **values}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as error:
        read_lora("mine", str(folder))
    assert str(error.value).startswith(f"the LoRA adapter 'mine' in {folder}: ")
    return str(error.value)


def test_what_peft_wrote(adapter: Path) -> None:
    read = read_lora("mine", str(adapter))
    assert (read.rank, read.scale) == (4, 1.5)
    assert len(read.matrices) == 2 * 7
    a, b = read.matrices["model.layers.1.mlp.down_proj"]
    assert (list(a.shape), list(b.shape)) == ([4, 96], [64, 4])
    assert torch.equal(a, load_file(adapter / WEIGHTS)["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"])


def test_rank_stabilised(copy: Path) -> None:
    set_config(copy, use_rslora=True)
    assert read_lora("mine", str(copy)).scale == 6 / math.sqrt(4)


# What PEFT itself writes for each of its variants. Those that begin by changing the base weights need no file to be told.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora=True"),
    "biases": ({"bias": "all"}, "bias='all'"),
    "a bias of its own": ({"lora_bias": True}, "lora_bias=True"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
    "ranks by layer": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
    "scales by layer": ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern="),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, "tensor .*embed_tokens.* is not supported"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_refused_by_name(variant: str, tiny_llama: Path, tmp_path: Path) -> None:
    settings, named = VARIANTS[variant]
    write_adapter(tiny_llama, tmp_path, **settings)
    with pytest.raises(ModelLoadError, match=named):
        read_lora("mine", str(tmp_path))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"peft_type": "IA3"}, "its peft_type is 'IA3', and only LORA is supported"),
        ({"peft_type": None}, "only LORA"),
        ({"use_something_new": True}, "use_something_new=True"),
        ({"kasa_config": {"beta": 1}}, "kasa_config="),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"r": 0}, "r in adapter_config.json must be a whole number from 1 to 512, not 0"),
        ({"r": True}, "not True"),
        ({"r": "8"}, "not '8'"),
        ({"r": 8}, "of rank 8"),  # the matrices are of rank 4
        ({"lora_alpha": None}, "lora_alpha in adapter_config.json must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
    ],
)
def test_a_config_that_is_no_good(values: dict[str, Any], named: str, copy: Path) -> None:
    set_config(copy, **values)
    assert named in refusal(copy)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({Q + "lora_A.weight": None}, "model.layers.0.self_attn.q_proj has a lora_B without its other half"),
        ({Q + "lora_A.weight": torch.zeros(4)}, "is [4] of torch.float32"),
        ({Q + "lora_A.weight": torch.zeros(5, 64)}, "is [5, 64]"),
        ({Q + "lora_B.weight": torch.zeros(64, 4, dtype=torch.int32)}, "of torch.int32"),
        ({Q + "lora_B.weight": torch.full((64, 4), float("inf"))}, "not finite"),
        ({Q + "lora_magnitude_vector": torch.zeros(64)}, "lora_magnitude_vector' is not supported"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)}, "is not supported"),
    ],
)
def test_tensors_that_are_no_good(values: dict[str, torch.Tensor | None], named: str, copy: Path) -> None:
    set_tensors(copy, **values)
    assert named in refusal(copy)


def test_files_that_are_no_good(copy: Path, tmp_path: Path) -> None:
    weights = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(weights[:-100])
    assert "not a sound safetensors file" in refusal(copy)
    (copy / WEIGHTS).unlink()
    assert "it has no adapter_model.safetensors" in refusal(copy)
    (copy / "adapter_model.bin").write_bytes(b"")
    assert "pickled weights (adapter_model.bin)" in refusal(copy)
    save_file({}, copy / WEIGHTS)
    assert "it holds no matrices" in refusal(copy)
    (copy / CONFIG).write_text("{")
    assert "not valid JSON" in refusal(copy)
    (copy / CONFIG).unlink()
    assert "can't be read" in refusal(copy)
    with pytest.raises(ModelLoadError, match="there is no folder '/nowhere/at all', and it is no hub id"):
        read_lora("mine", "/nowhere/at all")


def load(model: Path, adapter: Path) -> LLM:
    return LLM(str(model), dtype="float32", device="cpu", threads=1, max_model_len=64, kv_cache_memory=2**20, lora={"mine": str(adapter)})


def test_an_adapter_of_another_model(tiny_llama: Path, adapter: Path, copy: Path, tmp_path: Path) -> None:
    set_tensors(copy, **{Q + "lora_B.weight": torch.zeros(96, 4)})
    with pytest.raises(ModelLoadError, match=r"its model.layers.0.self_attn.q_proj is 96 x 64, and the model's is 64 x 64"):
        load(tiny_llama, copy)
    for module, (rows, columns) in {"lm_head": (512, 64), "model.layers.9.self_attn.q_proj": (64, 64)}.items():
        folder = Path(shutil.copytree(adapter, tmp_path / module))
        name = f"base_model.model.{module}.lora_"
        set_tensors(folder, **{name + "A.weight": torch.zeros(4, columns), name + "B.weight": torch.zeros(rows, 4)})
        with pytest.raises(ModelLoadError, match=rf"'mine' changes '{module}', which is not supported for this model; .* q_proj, k_proj"):
            load(tiny_llama, folder)
