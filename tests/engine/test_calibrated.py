"""`--quant awq`, `gptq` and `smoothquant` of an unquantised model, through the engine: calibrated once, then taken from the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minfer.engine.calibrated
from minfer.config import CALIBRATED
from minfer.engine.llm import LLM
from minfer.errors import ConfigError
from minfer.sampling_params import SamplingParams

OPTIONS: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "kv_cache_memory": 2**22, "device": "cpu"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(minfer.engine.calibrated, "SAMPLES", 4)
    monkeypatch.setattr(minfer.engine.calibrated, "SAMPLE_TOKENS", 24)
    return tmp_path / "cache" / "quantised"


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", hidden_size=64, intermediate_size=192)


def answer(model: Path, quant: str) -> tuple[list[int], LLM]:
    llm = LLM(str(model), quant=quant, **OPTIONS)
    (output,) = llm.generate("The quick brown fox", SamplingParams(max_tokens=8, temperature=0), use_tqdm=False)
    return list(output.outputs[0].token_ids), llm


@pytest.mark.parametrize("quant", CALIBRATED)
def test_calibrated_once_then_from_the_cache_and_rebuilt_when_damaged(
    quant: str, model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, llm = answer(model, quant)
    (entry,) = cache.iterdir()
    assert llm.engine.core.loaded.checkpoint.source.path == entry
    assert quant in llm.engine.core.loaded.checkpoint.known_as()
    assert "quantising" in caplog.text
    stamp = (entry / "model.safetensors").stat().st_mtime_ns
    caplog.clear()
    assert answer(model, quant)[0] == first
    assert (entry / "model.safetensors").stat().st_mtime_ns == stamp
    assert "quantising" not in caplog.text
    data = bytearray((entry / "model.safetensors").read_bytes())
    data[-40] ^= 1
    (entry / "model.safetensors").write_bytes(data)
    assert answer(model, quant)[0] == first
    assert f"{entry} is damaged and is made again" in caplog.text


def test_random_weights_have_nothing_to_calibrate() -> None:
    with pytest.raises(ConfigError, match="random weights"):
        LLM("smollm2-135m", load_format="dummy", quant="awq")
