"""Sampling defaults out of generation_config.json: used where a request is silent, overruled where it speaks; eos lists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import load, post
from transformers import GenerationConfig

from minfer import AsyncLLM, EngineConfig
from minfer.engine.engine import Engine
from minfer.errors import ConfigError, ModelLoadError
from minfer.sampling_params import SamplingParams
from minfer.server import ServerOptions
from minfer.server.run import _check_sampling_defaults

COMPLETE = "/v1/completions"


def copy_with(folder: Path, target: Path, **values: Any) -> Path:
    """The checkpoint with a generation_config.json that transformers wrote."""
    shutil.copytree(folder, target)
    GenerationConfig(**values).save_pretrained(target)
    return target


@pytest.fixture
def recommending(tiny_llama: Path, tmp_path: Path) -> Any:
    folder = copy_with(
        tiny_llama,
        tmp_path / "model",
        do_sample=True,
        temperature=0.01,
        top_k=1,
        repetition_penalty=1.3,
        eos_token_id=[2, 77],
        bos_token_id=0,
    )
    llm = load(folder)
    yield llm
    llm.shutdown()


def seen_params(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    seen: list[SamplingParams] = []
    add = llm.engine.add_tokens

    def spy(request_id: str, text: Any, ids: Any, params: SamplingParams, **options: Any) -> None:
        seen.append(params)
        add(request_id, text, ids, params, **options)

    monkeypatch.setattr(llm.engine, "add_tokens", spy)
    return seen


def test_defaults_and_who_overrules_them(recommending: AsyncLLM, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = seen_params(recommending, monkeypatch)
    with serve(recommending) as client:
        hello = [{"role": "user", "content": "hello"}]
        post(client, COMPLETE, prompt="a", max_tokens=1)
        post(client, "/v1/chat/completions", messages=hello, max_tokens=1, temperature=None, top_k=None)
        post(client, COMPLETE, prompt="a", max_tokens=1, temperature=0.7, top_k=0, repetition_penalty=1)
    for params in seen[:2]:
        assert (params.temperature, params.top_k, params.repetition_penalty, params.top_p) == (0.01, 1, 1.3, 1.0)
    assert (seen[2].temperature, seen[2].top_k, seen[2].repetition_penalty) == (0.7, 0, 1)
    with serve(recommending, generation_config="none") as client:
        post(client, COMPLETE, prompt="a", max_tokens=1)
    assert (seen[3].temperature, seen[3].top_k, seen[3].repetition_penalty) == (1.0, 0, 1.0)
    with pytest.raises(ConfigError, match="generation_config must be one of auto, none"):
        ServerOptions(generation_config="vllm")  # type: ignore[arg-type]


def test_every_token_of_the_eos_list_ends_an_answer(recommending: AsyncLLM, serve: Any) -> None:
    with serve(recommending) as client:
        for token in (2, 77):
            answer = post(client, COMPLETE, prompt="a", max_tokens=5, logit_bias={str(token): 100})
            assert answer["choices"][0]["finish_reason"] == "stop"
            assert answer["choices"][0]["text"] == ""
            assert answer["usage"]["completion_tokens"] == 1
        answer = post(client, COMPLETE, prompt="a", max_tokens=5, logit_bias={"77": 100}, repetition_penalty=1, ignore_eos=True)
        assert answer["usage"]["completion_tokens"] == 5


def test_a_checkpoint_without_recommendations_has_openais_defaults(client: httpx.Client, llm: AsyncLLM) -> None:
    assert llm.engine.model_config.sampling_defaults == ()


@pytest.mark.parametrize(("values", "says"), [({"temperature": -1}, "temperature"), ({"top_p": 7.5}, "top_p")])
def test_recommendations_out_of_range_are_found_at_the_start(tiny_llama: Path, tmp_path: Path, values: dict[str, Any], says: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    (folder / "generation_config.json").write_text(json.dumps({**values, "top_k": "many", "eos_token_id": 2}))
    engine = Engine.from_config(EngineConfig(model=str(folder), dtype="float32", device="cpu", threads=1, kv_cache_memory=4 << 20))
    with pytest.raises(ModelLoadError, match=f"generation_config.json: {says} .*--generation-config none"):
        _check_sampling_defaults(engine, ServerOptions())
    _check_sampling_defaults(engine, ServerOptions(generation_config="none"))
