"""GGUF files of mixtures of experts, written with the gguf package under the names that its own table gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from loader.conftest import interleave
from models.test_llama import PROMPT, load, logits_of, transformers_logits
from safetensors.torch import load_file

from minfer.errors import ModelLoadError
from minfer.loader import ModelSource, open_checkpoint
from minfer.quant import PackedWeight

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# family -> (architecture, options, its matrices of one expert, metadata)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, int]]] = {
    "mixtral": ("llama", {"num_local_experts": 4, "num_experts_per_tok": 2}, ("w1", "w2", "w3"), {}),
    "qwen2_moe": (
        "qwen2moe",
        {**EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False},
        ("gate_proj", "up_proj", "down_proj"),
        {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    ),
    "qwen3_moe": (
        "qwen3moe",
        {**EXPERTS, "norm_topk_prob": True, "head_dim": 32},
        ("gate_proj", "up_proj", "down_proj"),
        {"expert_feed_forward_length": 32, "attention.key_length": 32, "attention.value_length": 32},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}, (), {"attention.key_length": 32, "attention.value_length": 32}),
}


def convert(folder: Path, path: Path, family: str, kind: gguf.GGMLQuantizationType | None = None) -> Path:
    """kind: what the experts' tensors become."""
    arch, _, matrices, extra = FAMILIES[family]
    state = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    names = gguf.get_tensor_name_map(next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), 2)
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    for layer in range(2):
        for matrix in matrices:
            prefix = f"model.layers.{layer}.{block}.experts."
            parts = [state.pop(f"{prefix}{expert}.{matrix}.weight") for expert in range(4)]
            state[f"{prefix}{matrix}.weight"] = np.stack(parts)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_token_list([f"t{i}".encode() for i in range(512)])
    keys: dict[str, Any] = {
        "context_length": 512, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96, "attention.head_count": 4,
        "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5 if family == "mixtral" else 1e-6,
        "rope.freq_base": 1e6 if family == "mixtral" else 1e4, **extra,
    }  # fmt: skip
    if matrices:
        keys |= {"expert_count": 4, "expert_used_count": 2}
    for key, value in keys.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{arch}.{key}", value)
    for name, data in state.items():
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            data = interleave(data, 4 if ".q_proj." in name else 2)
        if name.endswith("shared_expert_gate.weight"):
            data = data[0]  # llama.cpp keeps it as a vector
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new_name is not None, name
        if kind is not None and data.ndim == 3:
            writer.add_tensor(new_name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(new_name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_comes_back(family: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(family, **FAMILIES[family][1])
    path = convert(folder, tmp_path / "m.gguf", family)
    state, checkpoint = load_file(folder / "model.safetensors"), open_checkpoint(ModelSource(kind="gguf", name="test", path=path))
    loaded = dict(checkpoint.tensors())
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    own = load(path, backend="cpu")
    assert (logits_of(own, PROMPT, [30, 15]) - transformers_logits(folder, PROMPT)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_quantised_experts_run_as_they_are(kind: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, type_id = make_checkpoint("mixtral", **FAMILIES["mixtral"][1]), gguf.GGMLQuantizationType[kind]
    path = convert(folder, tmp_path / "m.gguf", "mixtral", type_id)
    checkpoint = open_checkpoint(ModelSource(kind="gguf", name="test", path=path))
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".experts." in name:
            packed = checkpoint.read_packed(name)
            assert isinstance(packed, PackedWeight)
            wanted = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), type_id), type_id)
            assert np.array_equal(packed.dequantize().numpy(), wanted)
    assert logits_of(load(path, backend="cpu"), PROMPT, [45]).isfinite().all()


def test_experts_of_a_wrong_shape_are_named(make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint("qwen3_moe", **FAMILIES["qwen3_moe"][1])
    monkeypatch.setattr(np, "stack", lambda parts: parts[0])
    path = convert(folder, tmp_path / "m.gguf", "qwen3_moe")
    with pytest.raises(ModelLoadError, match=r"'blk.0.ffn_\w+_exps.weight' \[\d+, \d+\] must hold a matrix for each"):
        open_checkpoint(ModelSource(kind="gguf", name="test", path=path))
