"""`minfer quantize` from a shell: what it prints, the model's own samples, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minfer.cli.app import run


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> str:
    return str(make_checkpoint("llama", hidden_size=64, intermediate_size=192))


def test_a_model_calibrated_with_its_own_samples(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "gptq", "--group-size", "32", "--samples", "3", "--seqlen", "16", "--json"]
    sizes = []
    for name in ("a", "b"):
        assert run(["quantize", model, str(tmp_path / name), *flags]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["finished"] and result["format"] == "gptq" and 0 < result["mean_output_error"] < 0.3
        sizes.append((tmp_path / name / "model.safetensors").read_bytes())
    assert sizes[0] == sizes[1]  # the same seed, the same samples, the same checkpoint
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["group_size"] == 32
    assert run(["generate", str(tmp_path / "a"), "hello", "--max-tokens", "2", "--json"]) == 0


def test_a_part_of_a_model_of_random_weights(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "nf4", "--load-format", "dummy", "--max-layers", "1"]
    assert run(["quantize", model, str(tmp_path / "out"), *flags]) == 0
    assert "is unfinished; the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--method", "magic"], "magic"),
        (["--group-size", "48"], "groups of 48 don't divide 64 inputs"),
        (["--group-size", "32", "--calibration", "/no/such/file.txt"], "/no/such/file.txt can't be read"),
        (["--method", "nf4", "--format", "awq"], "the format awq can't hold nf4"),
        (["--group-size", "32", "--seqlen", "100000"], "--seqlen 100000 is more than the"),
    ],
)
def test_what_can_not_be_done_is_one_sentence(
    flags: list[str], why: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", model, str(tmp_path / "out"), *flags]) == 2
    assert why in capsys.readouterr().err
