"""`--quant` from a checkpoint to a running model: what is quantised, what comes from the cache, what is refused, the memory it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from minfer.config import CALIBRATED, EngineConfig, Quant
from minfer.errors import ModelLoadError
from minfer.loader import open_checkpoint, quantized_as_asked, resolve_model
from minfer.loader.quantize_on_load import RECIPES, QuantizedOnLoad
from minfer.quant import PackedWeight
from minfer.runner import BatchBuilder, LoadedModel, ModelRunner, RowSpan, load_model

PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(21)]
MATRICES = 14  # of two layers
# Half the coarsest step of each element, relative to the range of a weight's group (mxfp4's largest value is 6, its range up to 8).
STEP = {"int8": 1 / 254, "int4": 1 / 15, "fp8": 1 / 16, "nf4": 0.16, "mxfp4": 1 / 3}


class Row:
    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.blocks = (0, 1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantised"


@pytest.fixture(scope="session")
def source(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", hidden_size=64, intermediate_size=192)


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy of its own, so that tests that damage it don't meet."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def load(folder: Path, quant: Any, **options: Any) -> LoadedModel:
    options = {"dtype": "float32", "backend": "reference", "max_model_len": 64, "kv_cache_memory": 2**20, **options}
    return load_model(EngineConfig(model=str(folder), quant=quant, device="cpu", **options))


def logits(loaded: LoadedModel) -> torch.Tensor:
    runner = ModelRunner(loaded.model, loaded.cache, BatchBuilder(64, 1, 64, loaded.config.block_size, loaded.device))
    return runner.logits(runner.run([RowSpan(Row(PROMPT), 0, len(PROMPT), len(PROMPT))]))


def asked(folder: Path, quant: Any) -> Any:
    return quantized_as_asked(open_checkpoint(resolve_model(str(folder))), quant)


def test_every_name_has_one_way() -> None:
    assert {*RECIPES, *CALIBRATED, "auto", "none"} == set(get_args(Quant))


@pytest.mark.parametrize("quant", RECIPES)
def test_weights_are_within_a_step_and_the_rest_is_untouched(quant: str, folder: Path) -> None:
    plain, checkpoint = load_file(folder / "model.safetensors"), asked(folder, quant)
    count = 0
    for name, tensor in checkpoint.tensors(keep_packed=True):
        if not isinstance(tensor, PackedWeight):
            assert not name.endswith("_proj.weight")
            assert torch.equal(tensor, plain[name])
            continue
        count += 1
        size = tensor.scheme.group_size
        exact = plain[name].view(tensor.shape[0], -1, size)
        error = (tensor.dequantize().view_as(exact) - exact).abs().amax(-1)
        spread = exact.amax(-1).clamp(min=0) - exact.amin(-1).clamp(max=0) if quant == "int4" else exact.abs().amax(-1)
        assert bool((error <= spread * STEP[quant] * 1.01).all()), name
        assert checkpoint.tensor_infos[name].num_bytes < plain[name].nbytes / 3
    assert count == MATRICES


@pytest.mark.parametrize("quant", RECIPES)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_second_start_takes_all_from_the_cache_and_gives_the_same_logits(quant: str, backend: str, folder: Path, cache: Path) -> None:
    plain, first = logits(load(folder, "none", backend=backend)), logits(load(folder, quant, backend=backend))
    assert 0 < (first - plain).norm() / plain.norm() < {"int8": 0.05, "fp8": 0.2}.get(quant, 0.6)
    (entry,) = cache.iterdir()
    assert len(list(entry.iterdir())) == MATRICES
    again = load(folder, quant, backend=backend)
    assert isinstance(again.checkpoint, QuantizedOnLoad)
    assert again.checkpoint.cache_hits == MATRICES
    assert torch.equal(logits(again), first)


def test_a_damaged_entry_is_made_again_with_a_message(folder: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = logits(load(folder, "int4"))
    files = sorted(next(cache.iterdir()).iterdir())
    files[3].write_bytes(files[3].read_bytes()[:-5])
    data = bytearray(files[7].read_bytes())
    data[-5] ^= 1
    files[7].write_bytes(data)
    again = load(folder, "int4")
    assert torch.equal(logits(again), first)
    assert again.checkpoint.cache_hits == MATRICES - 2  # type: ignore[attr-defined]
    assert all(f"{files[n]} is damaged and is made again" in caplog.text for n in (3, 7))
    assert load(folder, "int4").checkpoint.cache_hits == MATRICES  # type: ignore[attr-defined]


def test_other_weights_are_another_entry(folder: Path, cache: Path) -> None:
    first = logits(load(folder, "int8"))
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in state.items()}, folder / "model.safetensors")
    assert not torch.equal(logits(load(folder, "int8")), first)
    assert len(list(cache.iterdir())) == 2


def test_what_it_is_at_is_told(folder: Path) -> None:
    said: list[str] = []
    config = EngineConfig(model=str(folder), quant="int8", max_model_len=64, kv_cache_memory=2**20, device="cpu", backend="reference")
    load_model(config, said.append)
    assert f"quantise to int8: matrix {MATRICES} of {MATRICES}" in said


def test_a_quantised_gguf_file_runs_as_it_is_or_is_rounded_again(smollm2_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SmolLM2 is Q4_1: int4 already."""
    assert not isinstance(asked(smollm2_gguf, "int4"), QuantizedOnLoad)
    assert caplog.text == ""
    again = asked(smollm2_gguf, "nf4")
    assert "rounds its weights again" in caplog.text
    name = "model.layers.29.self_attn.k_proj.weight"
    packed = again.read_packed(name)
    assert packed.scheme.element == "nf4"
    assert (packed.dequantize() - again._base.read(name)).abs().max() < 0.2
    assert again.read_packed("model.embed_tokens.weight").scheme.element == "int8"  # as in the file


@pytest.mark.parametrize("quant", CALIBRATED)
def test_what_needs_data_says_how_to_get_it(quant: str, folder: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"minfer quantize .* --method {quant}"):
        asked(folder, quant)


def test_sizes_that_an_element_cannot_hold(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("llama", hidden_size=48, intermediate_size=80)
    with pytest.raises(ModelLoadError, match="80 inputs"):
        asked(folder, "mxfp4")
    assert logits(load(folder, "int4")).isfinite().all()


def test_weights_that_are_not_finite_are_named(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"model\.safetensors.*layers\.1\.mlp\.up_proj.*not finite"):
        load(folder, "int8")


# Loads and reports, in MiB, how far resident memory rose at most and what of it the model keeps. A fresh process, as a peak never falls.
PROBE = """
import json, sys
from pathlib import Path
import torch
from minfer.config import EngineConfig
from minfer.runner.load import load_model
import minfer.kernels.cpu, minfer.loader.dummy, minfer.quant.algorithms
torch.set_num_threads(1)
def field(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
before = field("VmRSS")
config = EngineConfig(model=sys.argv[1], load_format=sys.argv[2], quant=sys.argv[3], device="cpu", max_model_len=64, kv_cache_memory=2**24)
model = load_model(config).model
weights = sum(m.weight.nbytes for m in model.modules() if hasattr(m, "ops") and hasattr(m, "weight")) / 2**20
print(json.dumps({"rise": field("VmHWM") - before, "weights": weights}))
"""
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_model_never_lies_in_memory_in_both_forms(load_format: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    dummy = open_checkpoint(resolve_model(str(tmp_path), load_format="dummy"))
    if load_format == "auto":
        save_file({name: tensor.clone() for name, tensor in dummy.tensors()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROBE, str(tmp_path), load_format, "int4"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
    whole = dummy.describe().num_bytes / 2**20  # 258 MiB in bfloat16
    assert whole > 250
    assert found["weights"] < whole / 2.5, "kept packed"
    # One matrix in float32 and what rounding it takes, beside the packed model. Never the 258 MiB themselves.
    assert found["rise"] < found["weights"] + 120


@pytest.fixture
def stored(source: Path, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of int8 rows as compressed-tensors writes them, with or without rounding of the inputs."""

    def make(**inputs: Any) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / "stored"))
        state = {}
        for name, tensor in load_file(folder / "model.safetensors").items():
            if name.endswith("_proj.weight"):
                scale = tensor.abs().amax(1, keepdim=True) / 127
                state |= {name: (tensor / scale).round().to(torch.int8), f"{name}_scale": scale}
            else:
                state[name] = tensor
        save_file(state, folder / "model.safetensors")
        group = {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
            "input_activations": inputs or None,
        }
        settings = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        return folder

    return make


def test_what_is_so_already_runs_as_it_is_and_what_contradicts_is_refused(stored: Callable[..., Path]) -> None:
    folder = stored(num_bits=8, type="int", strategy="token", dynamic=True)
    for quant in ("auto", "none", "int8", "smoothquant"):
        assert asked(folder, quant).format == "safetensors"
    for quant in ("awq", "gptq", "int4", "nf4", "fp8", "mxfp4"):
        with pytest.raises(ModelLoadError, match=f"quantised already .compressed-tensors.*--quant {quant} contradicts"):
            asked(folder, quant)


def test_weights_alone_in_int8_are_not_smoothquant(stored: Callable[..., Path]) -> None:
    with pytest.raises(ModelLoadError, match="--quant smoothquant contradicts"):
        asked(stored(), "smoothquant")
