"""Whole checkpoints through `quantize_model`: every method, what folding leaves unchanged, and interruption at any layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minfer import LLM, SamplingParams
from minfer.errors import ConfigError
from minfer.loader import Checkpoint, ModelSource, open_checkpoint
from minfer.quantize import LayerReport, Recipe, quantize_model
from minfer.quantize.layer import equalize
from minfer.quantize.observe import LayerRunner

RECIPES = {
    "rtn": Recipe(method="rtn", group_size=32),
    "rtn 3 bits": Recipe(method="rtn", bits=3, group_size=32, symmetric=False),
    "gptq": Recipe(method="gptq", group_size=32),
    "gptq in order of importance": Recipe(method="gptq", group_size=32, order="group", symmetric=False),
    "gptq as compressed-tensors": Recipe(method="gptq", group_size=32, format="compressed-tensors"),
    "awq": Recipe(method="awq", group_size=32),
    "awq as gptq": Recipe(method="awq", bits=3, group_size=32),
    "smoothquant": Recipe(method="smoothquant"),
    "fp8": Recipe(method="fp8"),
    "fp8-static": Recipe(method="fp8-static"),
    "nf4": Recipe(method="nf4"),
    "mxfp4": Recipe(method="mxfp4"),
    "mxfp6": Recipe(method="mxfp6"),
    "mxfp8": Recipe(method="mxfp8"),
    "nvfp4": Recipe(method="nvfp4"),
}


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelSource(kind="folder", name=str(folder), path=folder))


def samples(count: int = 4, length: int = 24) -> list[list[int]]:
    return torch.randint(3, 500, (count, length), generator=torch.Generator().manual_seed(0)).tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def plain(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", hidden_size=64, intermediate_size=192, num_hidden_layers=3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_makes_a_checkpoint_that_loads(name: str, plain: Path, tmp_path: Path) -> None:
    reports: list[LayerReport] = []
    quantize_model(opened(plain), RECIPES[name], tmp_path / "out", samples, on_layer=reports.append)
    again = opened(tmp_path / "out")
    assert again.quantization is not None
    bits = RECIPES[name].writer().layout.bits
    limit = {3: 0.3, 4: 0.2}.get(bits, 0.08)
    assert all(report.weight_error is not None and 0 < report.weight_error < limit for report in reports)
    assert all((report.output_error is None) == (not RECIPES[name].needs) for report in reports)
    prompt = [{"prompt_token_ids": [5, 6, 7]}]
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    ours = LLM(model=str(tmp_path / "out"), dtype="float32", backend="reference", max_model_len=64).generate(prompt, params, use_tqdm=False)
    assert len(ours[0].outputs[0].token_ids) == 3


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_folding_changes_no_output(method: Any, family: str, make_checkpoint: Callable[..., Path]) -> None:
    """Grouped queries (two query heads share a KV head) and, in Qwen2, biases that have to be divided too."""
    checkpoint = opened(make_checkpoint(family, hidden_size=64, intermediate_size=192))
    runner = LayerRunner(checkpoint.config, 24)
    prefix = "model.layers.0."
    weights = {n.removeprefix(prefix): checkpoint.read(n).float() for n in checkpoint.tensor_infos if n.startswith(prefix)}
    hidden = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    hidden[:, ::16] *= 30
    with torch.inference_mode():
        layer = runner.layer(0, weights)
        recipe = Recipe(method=method, bits=4, group_size=32)
        seen = runner.observe(layer, recipe.needs, 1)
        before = runner.run(layer, hidden)
        old = dict(weights)
        equalize(weights, seen, recipe, checkpoint.config)
        after = runner.run(runner.layer(0, weights), hidden)
    assert any(not torch.equal(old[name], weights[name]) for name in weights)
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_goes_on_and_ends_the_same(plain: Path, tmp_path: Path) -> None:
    recipe, whole, halted = RECIPES["gptq"], tmp_path / "whole", tmp_path / "halted"
    quantize_model(opened(plain), recipe, whole, samples)

    class Stop(Exception):
        pass

    def stop(report: LayerReport) -> None:
        if report.layer == 1:
            raise Stop

    with pytest.raises(Stop):
        quantize_model(opened(plain), recipe, halted, samples, on_layer=stop)
    assert not (halted / "config.json").exists()
    half = halted / ".unfinished" / "layer-00001.safetensors"
    half.write_bytes(half.read_bytes()[:500])  # and the machine lost power while it wrote
    reports: list[LayerReport] = []
    quantize_model(opened(plain), recipe, halted, None, on_layer=reports.append)  # the samples were kept
    assert [report.weight_error is None for report in reports] == [True, False, False]
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, halted))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(file.name for file in whole.iterdir()) == sorted(file.name for file in halted.iterdir())


def test_another_run_is_not_mixed_in(plain: Path, tmp_path: Path) -> None:
    quantize_model(opened(plain), RECIPES["rtn"], tmp_path / "out", max_layers=1)
    with pytest.raises(ConfigError, match="the beginning of another run"):
        quantize_model(opened(plain), RECIPES["nf4"], tmp_path / "out")
    quantize_model(opened(plain), RECIPES["rtn"], tmp_path / "out")
    with pytest.raises(ConfigError, match="holds a model already"):
        quantize_model(opened(plain), RECIPES["rtn"], tmp_path / "out")
    with pytest.raises(ConfigError, match="is quantised already"):
        quantize_model(opened(tmp_path / "out"), RECIPES["rtn"], tmp_path / "twice")


def test_large_models_are_written_in_shards(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minfer.quantize.folder.SHARD_BYTES", 100_000)
    quantize_model(opened(plain), RECIPES["rtn"], tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    opened(tmp_path / "out")


def test_what_does_not_fit_is_said_before_any_work(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"self_attn.q_proj: groups of 128 don't divide 64 inputs"):
        quantize_model(opened(plain), Recipe(method="rtn", group_size=128), tmp_path / "out")
    with pytest.raises(ConfigError, match="gptq needs calibration data"):
        quantize_model(opened(plain), RECIPES["gptq"], tmp_path / "no-data")
    with pytest.raises(ConfigError, match="all of one length"):
        quantize_model(opened(plain), RECIPES["gptq"], tmp_path / "ragged", lambda: [[1, 2], [3]])
    with pytest.raises(ConfigError, match="outside of the model's vocabulary of 512"):
        quantize_model(opened(plain), RECIPES["gptq"], tmp_path / "ids", lambda: [[1, 512]])


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"method": "exl2"}, "method must be one of"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8"),
        ({"group_size": 4}, "at least 8"),
        ({"damping": 0}, "damping must be above 0"),
        ({"alpha": 2}, "alpha must be from 0 to 1"),
        ({"order": "random"}, "order must be one of"),
        ({"format": "marlin"}, "format must be auto or"),
        ({"method": "awq", "bits": 8, "format": "awq"}, "it holds 4-bit integers"),
        ({"method": "gptq", "order": "group", "format": "compressed-tensors"}, "don't read an order of inputs"),
    ],
)
def test_a_recipe_checks_itself(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Recipe(**settings)


@pytest.mark.parametrize("name", ["rtn", "rtn 3 bits", "fp8", "nf4", "mxfp4"])
def test_a_mixture_of_experts(name: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Every expert's matrices are packed and the routers left alone, which the config says too; what needs data is refused."""
    folder = make_checkpoint("mixtral", num_local_experts=3, hidden_size=64, intermediate_size=128)
    quantize_model(opened(folder), RECIPES[name], tmp_path / "out")
    again, plain = opened(tmp_path / "out"), opened(folder)
    for tensor, info in plain.tensor_infos.items():
        same = torch.equal(again.read(tensor).float(), plain.read(tensor).float())
        assert same == (len(info.shape) == 1 or tensor.endswith(("gate.weight", "lm_head.weight", "embed_tokens.weight"))), tensor
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "layers.1.block_sparse_moe.gate" in json.dumps(settings).replace("\\", "")
    answer = LLM(str(tmp_path / "out"), device="cpu", max_model_len=64, kv_cache_memory=2**20)
    assert len(answer.generate([[5, 9]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)[0].outputs[0].token_ids) == 3
    with pytest.raises(ConfigError, match="awq needs the inputs of every matrix"):
        quantize_model(opened(folder), RECIPES["awq"], tmp_path / "no", samples)
