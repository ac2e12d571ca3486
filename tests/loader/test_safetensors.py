from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minfer.errors import ModelLoadError
from minfer.loader import Checkpoint, ModelSource, open_checkpoint

INDEX = "model.safetensors.index.json"


def open_folder(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelSource(kind="folder", name="test", path=folder))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_saved_by_transformers_comes_back(
    tiny: Callable[..., Any], tmp_path: Path, family: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = tiny(family, dtype, **options)
    model.save_pretrained(tmp_path)
    checkpoint = open_folder(tmp_path)
    expected = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight" or not options.get("tie_word_embeddings")}
    loaded = dict(checkpoint.tensors())
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    assert checkpoint.config.num_parameters == sum(p.numel() for p in model.parameters())
    assert checkpoint.config.dtype == str(dtype).removeprefix("torch.")
    assert checkpoint.tokenizer_source == tmp_path
    assert checkpoint.quantization is None
    summary = checkpoint.describe()
    assert summary.num_bytes == sum(t.nbytes for t in expected.values()) == sum(summary.bytes_by_dtype.values())
    assert summary.files == (tmp_path / "model.safetensors",)


def test_shards_are_read_through_the_index(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).is_file()
    checkpoint = open_folder(tmp_path)
    assert len(checkpoint.describe().files) > 2
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in checkpoint.tensors())


def test_the_single_file_wins_over_an_index_and_mistrals_own_file_is_ignored(folder: Path) -> None:
    (folder / INDEX).write_text("not json")
    (folder / "consolidated.safetensors").write_bytes(b"rubbish")
    assert dict(open_folder(folder).tensors())


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_beside_the_tie_flag_counts_if_it_differs(tiny: Callable[..., Any], tmp_path: Path, equal: bool) -> None:
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = open_folder(tmp_path)
    assert checkpoint.config.tie_word_embeddings is equal
    assert ("lm_head.weight" in dict(checkpoint.tensors())) is not equal


def test_old_rotary_buffers_are_ignored_and_a_silent_config_takes_the_files_dtype(folder: Path) -> None:
    state = {n: t.half() for n, t in load_file(folder / "model.safetensors").items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_folder(folder)
    assert checkpoint.config.dtype == "float16"
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in dict(checkpoint.tensors())


def test_generation_config_brings_the_fuller_list_of_end_tokens(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[2, 7])
    assert open_folder(folder).config.eos_token_ids == (2, 7)


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(Q), [Q, "missing", "[32, 32]"]),
        (lambda s: s.update({Q: torch.zeros(32, 16)}), [Q, "[32, 16]", "[32, 32]", "model.safetensors"]),
        (lambda s: s.update({Q: torch.zeros(1024)}), [Q, "[1024]"]),
        (lambda s: s.update({"model.layers.1.self_attn.q_norm.weight": torch.zeros(8)}), ["q_norm", "no place", "LlamaForCausalLM"]),
        (lambda s: s.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(64, 32)}), ["layers.2.mlp", "no place"]),
        (lambda s: s.update({Q: torch.zeros(32, 32, dtype=torch.int8)}), [Q, "I8", "BF16"]),
        (lambda s: s.update({Q: torch.zeros(32, 32).to(torch.float8_e4m3fn)}), [Q, "F8_E4M3"]),
        (lambda s: s.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
    ],
)
def test_tensors_that_do_not_match_the_config_are_named(folder: Path, change: Callable[[Any], object], words: list[str]) -> None:
    change_tensors(folder, change)
    with pytest.raises(ModelLoadError) as caught:
        open_folder(folder)
    assert all(word in str(caught.value) for word in [*words, str(folder)]), caught.value


def test_a_truncated_file_names_the_first_tensor_that_is_cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    begin, end = header[Q]["data_offsets"]
    file.write_bytes(data[: 8 + length + (begin + end) // 2])
    with pytest.raises(ModelLoadError, match=f"model.safetensors is truncated in tensor '{Q}'.*expected at least {8 + length + end}"):
        open_folder(folder)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 64, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2**40) + b"{}"])
def test_files_that_are_not_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors"):
        open_folder(folder)


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "../up.safetensors"}, {"a": "/etc/x.safetensors"}, {"a": "sub/x.safetensors"}, {"a": "x.bin"}, {"a": 5}, {}, [], {"a": ".."}],
)
def test_an_index_must_name_files_of_its_own_folder(folder: Path, weight_map: Any) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "up.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelLoadError, match="index"):
        open_folder(folder)


def test_a_missing_shard_and_a_tensor_in_two_shards(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].rename(tmp_path / "away")
    with pytest.raises(ModelLoadError, match=f"{shards[1].name} is missing"):
        open_folder(tmp_path)
    shutil.copy(shards[0], shards[1])
    with pytest.raises(ModelLoadError, match="already"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"pytorch_model.bin": b"\x80\x04"}, "pickled weights .*pytorch_model.bin.*never loads"),
        ({"consolidated.safetensors": b""}, "consolidated"),
        ({}, "no .safetensors file"),
    ],
)
def test_folders_without_usable_weights(folder: Path, files: dict[str, bytes], words: str) -> None:
    (folder / "model.safetensors").unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=words):
        open_folder(folder)


def test_unknown_quantisation_methods_are_refused_by_name(folder: Path) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": "exl3", "bits": 4})
    with pytest.raises(ModelLoadError, match=r"method 'exl3' is not supported; .*use .*GGUF"):
        open_folder(folder)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "[]",
        "{",
        "[" * 100_000,
        '{"architectures": 5}',
        '{"architectures": ["GPT2LMHeadModel"]}',
        '{"architectures": ["LlamaForCausalLM"]}',
    ],
)
def test_configs_that_are_not_configs(folder: Path, config: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        open_folder(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": "4"},
        {"num_attention_heads": [4]},
        {"head_dim": 8.0},
        {"hidden_size": -32},
        {"num_hidden_layers": 2**40, "sliding_window": 4, "architectures": ["MistralForCausalLM"]},
        {"num_hidden_layers": 9000},
        {"vocab_size": 2**62},
        {"rms_norm_eps": "x"},
        {"rope_scaling": 5, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "yarn", "factor": "x"}},
        {"eos_token_id": {"a": 1}, "num_key_value_heads": 3},
    ],
)
def test_configs_with_impossible_values(folder: Path, change: dict[str, Any]) -> None:
    edit_json(folder / "config.json", **change)
    with pytest.raises(ModelLoadError):
        open_folder(folder)


def test_no_config_at_all(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json can't be read"):
        open_folder(folder)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_give_a_load_error_or_load(folder: Path, data: st.DataObject) -> None:
    original = folder.parent / "original.safetensors"
    if not original.exists():
        shutil.copy(folder / "model.safetensors", original)
    damaged = bytearray(original.read_bytes())
    header = 8 + struct.unpack("<Q", damaged[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.sampled_from(b'0129"{}[],:-e\x00\xff') | st.integers(0, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    (folder / "model.safetensors").write_bytes(damaged)
    try:
        for _, tensor in open_folder(folder).tensors():
            tensor.sum()
    except ModelLoadError:
        pass
