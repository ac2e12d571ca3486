"""A model in each format, written from the specification, gives exactly the logits of the same model dequantised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from formats import FORMATS, Format
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minfer.config import EngineConfig
from minfer.errors import ModelLoadError
from minfer.loader import ModelSource, open_checkpoint
from minfer.quant import PackedWeight
from minfer.runner import BatchBuilder, LoadedModel, ModelRunner, RowSpan, load_model

PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(21)]
FIXTURES = Path(__file__).parent / "fixtures"
DOWN = "model.layers.1.mlp.down_proj"
Folders = Callable[[Format], tuple[Path, Path]]


class Row:
    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.blocks = (0, 1)


def load(folder: Path) -> LoadedModel:
    return load_model(
        EngineConfig(model=str(folder), dtype="float32", device="cpu", backend="reference", max_model_len=64, kv_cache_memory=2**20)
    )


def logits(folder: Path, tokens: list[int] = PROMPT) -> torch.Tensor:
    loaded = load(folder)
    runner = ModelRunner(loaded.model, loaded.cache, BatchBuilder(64, 1, 64, loaded.config.block_size, loaded.device))
    return runner.logits(runner.run([RowSpan(Row(tokens), 0, len(tokens), len(tokens))]))


def open_folder(folder: Path) -> Any:
    return open_checkpoint(ModelSource(kind="folder", name=str(folder), path=folder))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("name", FORMATS)
def test_logits_equal_those_of_the_dequantised_model(name: str, quantised: Folders) -> None:
    folder, dense = quantised(FORMATS[name])
    expected = logits(dense)
    assert expected.std() > 0.1, "flat logits would hide a difference"
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_are_those_of_the_dequantised_model_packed_or_not(name: str, quantised: Folders) -> None:
    folder, dense = quantised(FORMATS[name])
    checkpoint, expected = open_folder(folder), dict(open_folder(dense).tensors())
    assert checkpoint.quantization
    count = 0
    for tensor_name, tensor in checkpoint.tensors(keep_packed=True):
        count += isinstance(tensor, PackedWeight)
        value = tensor.dequantize() if isinstance(tensor, PackedWeight) else tensor
        assert torch.equal(value, expected[tensor_name]), tensor_name
    assert {n for n, _ in checkpoint.tensors()} == expected.keys()
    assert count == (0 if name == "hqq axis 0" else 14)


@pytest.mark.parametrize("file", sorted(FIXTURES.glob("model_*.safetensors")), ids=lambda file: file.stem)
def test_models_saved_by_transformers_give_its_logits(file: Path, tmp_path: Path) -> None:
    """Against transformers' own dequantised model, in float32; the whole checkpoint is as its `save_pretrained` left it."""
    with safe_open(file, framework="pt") as f:
        (tmp_path / "config.json").write_text(f.metadata()["config"])
    tensors = load_file(file)
    expected = tensors.pop("expected_logits")
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_folder(tmp_path).quantization
    assert expected.std() > 0.1
    assert (logits(tmp_path, list(range(1, 21))) - expected).abs().max() < 1e-4


def test_what_kernels_have_comes_in_their_elements(quantised: Folders) -> None:
    """3 bits become 4: see PackedWeight.widened."""
    folder, _ = quantised(FORMATS["gptq, 3 bits, act-order"])
    packed = open_folder(folder).read_packed(DOWN + ".weight")
    assert (packed.scheme.element, packed.scheme.group_size) == ("int4", 32)


def test_settings_beside_the_config_are_found(quantised: Folders) -> None:
    folder, dense = quantised(FORMATS["gptq"])
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    del settings["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="I32"):
        open_folder(folder)
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    assert torch.equal(logits(folder), logits(dense))


def test_layers_left_alone_and_a_quantised_head(quantised: Folders) -> None:
    """What is quantised is decided by what is in the file: a plain layer among packed ones, a packed head of a model called tied."""
    folder, dense = quantised(FORMATS["awq"])
    head, head_dense = FORMATS["awq"].make(torch.Generator().manual_seed(5), 512, 64)
    whole = torch.randn(64, 192) * 0.1

    def change(state: dict[str, torch.Tensor]) -> None:
        for end in ("qweight", "qzeros", "scales"):
            del state[f"{DOWN}.{end}"]
        del state["lm_head.weight"]
        state[DOWN + ".weight"] = whole
        state.update({f"lm_head.{end}": part.contiguous() for end, part in head.items()})

    edit(folder, change)
    edit(dense, lambda state: state.update({DOWN + ".weight": whole, "lm_head.weight": head_dense}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert torch.equal(logits(folder), logits(dense))


def test_biases_of_zeros_and_scales_of_a_quantised_cache_are_dropped_others_are_not(quantised: Folders) -> None:
    folder, dense = quantised(FORMATS["gptq"])
    edit(folder, lambda state: state.update({DOWN + ".bias": torch.zeros(64), "model.layers.0.self_attn.k_scale": torch.ones(1)}))
    assert torch.equal(logits(folder), logits(dense))
    edit(folder, lambda state: state.update({DOWN + ".bias": torch.ones(64)}))
    with pytest.raises(ModelLoadError, match=r"down_proj\.bias"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["gptq", "compressed-tensors int4", "fp8 blocks", "bitsandbytes nf4", "hqq"])
def test_a_part_that_is_missing_or_extra_is_named(name: str, quantised: Folders) -> None:
    folder, _ = quantised(FORMATS[name])
    scale = {"gptq": "scales", "bitsandbytes nf4": "weight.absmax", "hqq": "scale", "fp8 blocks": "weight_scale_inv"}.get(
        name, "weight_scale"
    )
    edit(folder, lambda state: state.pop(f"{DOWN}.{scale}"))
    with pytest.raises(ModelLoadError, match=scale):
        open_folder(folder)
    edit(folder, lambda state: state.update({f"{DOWN}.strange": torch.ones(1), f"{DOWN}.{scale}": torch.ones(1)}))
    with pytest.raises(ModelLoadError):
        open_folder(folder)


def test_damaged_numbers_name_the_file_and_the_layer(quantised: Folders) -> None:
    folder, _ = quantised(FORMATS["awq"])
    edit(folder, lambda state: state[DOWN + ".scales"].fill_(float("nan")))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: model\.layers\.1\.mlp\.down_proj: its scales are not all finite"):
        load(folder)


def test_weights_that_are_no_numbers_name_the_file_and_the_layer(quantised: Folders) -> None:
    """Before any backend sees the matrix: kernels that convert codes by moving their bits would read 480."""
    folder, _ = quantised(FORMATS["fp8 blocks"])
    edit(folder, lambda state: state[DOWN + ".weight"].view(torch.uint8)[3].fill_(0xFF))
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: model\.layers\.1\.mlp\.down_proj: some of its weights are NaN"):
        load(folder)


def test_a_truncated_file_is_named(quantised: Folders) -> None:
    folder, _ = quantised(FORMATS["gptq"])
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match="truncated"):
        open_folder(folder)
