"""`minfer train-draft` from a shell: a head that has learned a small model, whole or interrupted, read back by the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minfer import LLM, SamplingParams
from minfer.cli.app import run
from minfer.training import loop

QUESTIONS = ["What is a cache?", '{"prompt": "Name a fox."}', '{"messages": [{"role": "user", "content": "1 2 3"}]}'] * 16
SMALL = ["--tokens", "1000", "--max-answer", "24", "--draft-vocab", "200", "--threads", "1", "--learning-rate", "3e-3"]


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", num_hidden_layers=8, eos_token_id=511)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("\n".join(QUESTIONS))
    return file


def trained(model: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    arguments = ["train-draft", str(model), "--out", str(out), "--data", str(data), *SMALL, "--json", *flags]
    assert run(arguments) == 0, capsys.readouterr().err
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("kind", ["eagle3", "medusa", "redrafter"])
def test_a_trained_head_drafts_what_the_model_says(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    result = trained(model, data, tmp_path, capsys, "--kind", kind, "--epochs", "6")
    assert result["kind"] == kind
    first, *_ = result["held_out_acceptance"]
    assert first > 0.2, "the questions repeat, so what was learned of them must show"
    plain = LLM(str(model), dtype="float32", threads=1, kv_cache_memory=2**22)
    options: dict[str, Any] = {"speculative": "draft", "draft_model": str(tmp_path), "adaptive_drafts": False, "num_draft_tokens": 3}
    llm = LLM(str(model), dtype="float32", threads=1, kv_cache_memory=2**22, **options)
    chat = [{"role": "user", "content": "What is a cache?"}]
    params = SamplingParams(temperature=0, max_tokens=24)
    ours, theirs = (engine.chat(chat, params, use_tqdm=False)[0].outputs[0].token_ids for engine in (llm, plain))
    assert ours == theirs
    stats = llm.engine.core.speculation.stats  # type: ignore[union-attr]
    assert stats.num_accepted_tokens > 0


def test_an_interrupted_training_ends_where_it_would_have(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(model, data, tmp_path / "whole", capsys, "--epochs", "2")
    calls = 0
    save = loop._save

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        save(*arguments)
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_save", interrupted)
        flags = ["--data", str(data), *SMALL, "--epochs", "2"]
        assert run(["train-draft", str(model), "--out", str(tmp_path / "parts"), *flags]) == 130
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    trained(model, data, tmp_path / "parts", capsys, "--epochs", "2")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.allclose(tensor.float(), parts[name].float(), atol=1e-3), name
    assert run(["train-draft", str(model), "--out", str(tmp_path / "parts"), *flags, "--depth", "2"]) == 2
    assert "is of a training with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["eagle3", "medusa", "redrafter"])
def test_a_head_made_before_is_where_another_training_starts(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    first = trained(model, data, tmp_path / "first", capsys, "--kind", kind, "--epochs", "4")
    flags = ["--data", str(data), *(flag for flag in SMALL if flag not in ("--draft-vocab", "200")), "--kind", kind, "--epochs", "1"]
    start = ["--start-from", str(tmp_path / "first"), "--learning-rate", "1e-6", "--seed", "9"]
    assert run(["train-draft", str(model), "--out", str(tmp_path / "second"), *flags, *start, "--json"]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["held_out_acceptance"] == pytest.approx(first["held_out_acceptance"], abs=0.05), "at this rate nothing is learned"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor.float(), after[name].float(), atol=1e-2), name
    assert run(["train-draft", str(model), "--out", str(tmp_path / "third"), *flags, *start, "--draft-vocab", "100"]) == 2
    assert "a head keeps the ids that it can guess" in capsys.readouterr().err
    other = "medusa" if kind == "eagle3" else "eagle3"
    assert run(["train-draft", str(model), "--out", str(tmp_path / "second"), *flags, *start, "--kind", other]) == 2
    assert f"first is a head of the kind {kind}, and --kind asks for {other}" in capsys.readouterr().err
    if kind == "medusa":
        assert run(["train-draft", str(model), "--out", str(tmp_path / "fourth"), *flags, *start, "--depth", "2"]) == 2
        said = capsys.readouterr().err
        assert "first is no medusa head of depth 2 for this model: its blocks.2.layers.0.bias is [" in said
        assert "and should be missing" in said


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--kind", "magic"], "--kind must be one of eagle3, medusa, redrafter"),
        (["--data", "/no/such/file"], "--data /no/such/file can't be read"),
        (["--start-from", "/no/such/head"], "/no/such/head holds no head to start from"),
    ],
)
def test_what_can_not_be_done_is_one_sentence(
    flags: list[str], why: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train-draft", str(model), "--out", str(tmp_path), *flags]) == 2
    assert why in capsys.readouterr().err


def test_a_model_of_few_layers_is_refused(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train-draft", str(tiny_llama), "--out", str(tmp_path)]) == 2
    assert "need at least 7" in capsys.readouterr().err
