"""Adapters over HTTP: one is asked for as the model, answers as it, and is listed below its parent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import NAME, chunks, load, post, running, streamed_text
from lora_adapters import greedy, write_adapter

from minfer import AsyncLLM, EngineConfig
from minfer.errors import ConfigError
from minfer.server.options import ServerOptions
from minfer.server.run import run_server

PROMPT = [5, 9, 200, 17]
COMPLETE = "/v1/completions"
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "skip_special_tokens": False}


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: str(write_adapter(tiny_llama, folder / name, seed)) for seed, name in enumerate(("french", "org/legal"))}


@pytest.fixture(scope="module")
def adapted(tiny_llama: Path, adapters: dict[str, str]) -> Iterator[AsyncLLM]:
    llm = load(tiny_llama, lora=adapters)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def server(adapted: AsyncLLM) -> Iterator[httpx.Client]:
    with running(adapted) as client:
        yield client


@pytest.fixture(scope="module")
def texts(tiny_llama: Path, adapters: dict[str, str], adapted: AsyncLLM) -> dict[str, str]:
    """PEFT's answers."""
    assert adapted.tokenizer is not None
    found = {}
    for name, folder in {NAME: None, **adapters}.items():
        (ids,) = greedy(tiny_llama, None if folder is None else Path(folder), [PROMPT], 16)
        found[name] = adapted.tokenizer.decode(ids, skip_special_tokens=False)
    assert len(set(found.values())) == 3
    return found


def test_the_model_of_a_request_may_be_an_adapter(server: httpx.Client, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        answer = post(server, COMPLETE, model=name, **BODY)
        assert (answer["model"], answer["choices"][0]["text"]) == (name, text)
        parts = chunks(server, COMPLETE, model=name, **BODY)
        assert {part["model"] for part in parts} == {name}
        assert streamed_text(parts) == text
    assert post(server, COMPLETE, **BODY)["choices"][0]["text"] == texts[NAME], "who names no model gets the model itself"
    assert "minfer:lora_tokens_total" in server.get("/metrics").text


def test_adapters_at_the_same_time(server: httpx.Client, texts: dict[str, str], adapted: AsyncLLM) -> None:
    """Sent together, run together, answered each by its own."""
    got: list[tuple[str, str]] = []

    def ask(name: str) -> None:
        got.append((name, post(server, COMPLETE, model=name, **BODY)["choices"][0]["text"]))

    threads = [threading.Thread(target=ask, args=(name,)) for name in [*texts, *texts]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(got) == sorted([*texts.items(), *texts.items()])


def test_chats_and_embeddings(server: httpx.Client) -> None:
    said, vectors = set(), set()
    for name in (NAME, "french", "org/legal"):
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answer = post(server, "/v1/chat/completions", model=name, **body)
        embedding = post(server, "/v1/embeddings", model=name, input=[5, 9])
        assert answer["model"] == embedding["model"] == name
        said.add(answer["choices"][0]["message"]["content"])
        vectors.add(tuple(embedding["data"][0]["embedding"]))
    assert len(said) == len(vectors) == 3


def test_they_are_listed_below_their_parent(server: httpx.Client, adapters: dict[str, str], tiny_llama: Path) -> None:
    models = server.get("/v1/models").json()["data"]
    assert [(m["id"], m["root"], m["parent"]) for m in models] == [
        (NAME, str(tiny_llama), None),
        ("french", adapters["french"], NAME),
        ("org/legal", adapters["org/legal"], NAME),
    ]
    assert server.get("/v1/models/org/legal").json() == models[2]
    assert post(server, "/tokenize", model="french", prompt="a")["count"] == 1


def test_another_name_is_a_404_that_lists_them(server: httpx.Client, adapted: AsyncLLM) -> None:
    for path, body in ((COMPLETE, BODY), ("/v1/embeddings", {"input": "a"}), ("/v1/chat/completions", {"messages": []})):
        answer = server.post(path, json={**body, "model": "german"})
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == "the model 'german' does not exist; this server has 'tiny', 'french', 'org/legal'"
    assert server.get("/v1/models/german").status_code == 404
    with running(adapted, any_model_name=True) as client:
        assert post(client, COMPLETE, model="gpt-4", **BODY)["model"] == NAME
        assert post(client, COMPLETE, model="french", **BODY)["model"] == "french"


def test_an_adapter_cannot_have_the_models_name() -> None:
    with pytest.raises(ConfigError, match="the LoRA adapter 'tiny' has the model's own name"):
        run_server(EngineConfig(model="/nowhere", lora={"tiny": "/nowhere"}), ServerOptions(served_model_name="tiny"))
