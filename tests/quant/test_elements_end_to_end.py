"""Every element and every kind of scale through a whole model: each backend's logits from packed weights, against the dequantised model's.

table4, whose values only a file can bring, comes with bitsandbytes' fp4 and GGUF's IQ types: test_readers_end_to_end.py, test_gguf.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minfer.config import EngineConfig
from minfer.kernels.cpu.library import find
from minfer.loader import ModelSource, open_checkpoint
from minfer.loader.quantize_on_load import RECIPES, QuantizedOnLoad, Recipe
from minfer.runner import BatchBuilder, ModelRunner, RowSpan, load_model

PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(21)]

FLOAT = {
    "int2": Recipe("int2", (32,)),
    "int2, minima": Recipe("int2", (16,), symmetric=False),
    "int3": Recipe("int3", (32,)),
    "int4": Recipe("int4", (32,)),
    "int4, minima": Recipe("int4", (32,), symmetric=False),
    "int8": Recipe("int8", ()),
    "int8, minima": Recipe("int8", (32,), symmetric=False),
    "fp8 e4m3": Recipe("fp8_e4m3", ()),
    "fp8 e5m2": Recipe("fp8_e5m2", (32,)),
    "fp6 e2m3": Recipe("fp6_e2m3", (32,)),
    "fp6 e3m2": Recipe("fp6_e3m2", (32,)),
    "fp4 e2m1": Recipe("fp4_e2m1", (32,)),
    "nf4": Recipe("nf4", (32,)),
}
SPECIAL = {
    "mxfp8": Recipe("fp8_e4m3", (32,), scale_type="e8m0"),
    "mxfp8 e5m2": Recipe("fp8_e5m2", (32,), scale_type="e8m0"),
    "mxfp6": Recipe("fp6_e2m3", (32,), scale_type="e8m0"),
    "mxfp6 e3m2": Recipe("fp6_e3m2", (32,), scale_type="e8m0"),
    "mxfp4": Recipe("fp4_e2m1", (32,), scale_type="e8m0"),
    "mxint8": Recipe("int8", (32,), scale_type="e8m0"),
    "nvfp4": Recipe("fp4_e2m1", (16,), scale_type="e4m3"),
}
RECIPES_OF_ALL = {**FLOAT, **SPECIAL}


class Row:
    token_ids = PROMPT
    blocks = (0, 1)


def logits(config: EngineConfig) -> tuple[torch.Tensor, dict[str, str]]:
    loaded = load_model(
        dataclasses.replace(config, dtype="float32", device="cpu", max_model_len=64, kv_cache_memory=2**20, activations="none")
    )
    runner = ModelRunner(loaded.model, loaded.cache, BatchBuilder(64, 1, 64, loaded.config.block_size, loaded.device))
    return runner.logits(runner.run([RowSpan(Row(), 0, len(PROMPT), len(PROMPT))])), loaded.ops.chosen


@pytest.mark.parametrize("name", RECIPES_OF_ALL)
def test_every_element_runs_in_every_backend_as_its_dequantised_model(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(RECIPES, "int4", RECIPES_OF_ALL[name])  # what --quant int4 does from here on
    source = open_checkpoint(ModelSource(kind="folder", name=str(tiny_llama), path=tiny_llama))
    dense = tmp_path / "dense"
    dense.mkdir()
    save_file(
        {key: tensor.float().contiguous() for key, tensor in QuantizedOnLoad(source, "int4", None).tensors()}, dense / "model.safetensors"
    )
    (dense / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    expected, _ = logits(EngineConfig(model=str(dense), backend="reference"))
    plain, _ = logits(EngineConfig(model=str(tiny_llama), backend="reference"))
    assert not torch.equal(expected, plain), "nothing was rounded"
    found, _ = logits(EngineConfig(model=str(tiny_llama), backend="reference", quant="int4"))
    assert torch.equal(found, expected)
    if find() is None:
        pytest.skip("the compiled CPU kernels are not built; the reference is right")
    found, chosen = logits(EngineConfig(model=str(tiny_llama), backend="auto", quant="int4"))
    assert {how for op, how in chosen.items() if op.startswith("linear[") and "float32" not in op} == {"cpu"}, chosen
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
