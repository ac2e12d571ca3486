"""/v1/embeddings through the openai client and by hand: both encodings, lists, dimensions, refusals, clients that leave."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from http_helpers import load, post, slow_down, wait_until_free
from transformers import AutoModel, AutoTokenizer

from minfer import AsyncLLM

PATH = "/v1/embeddings"
TEXTS = ["The quick brown fox", "Zwölf 🌍"]


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> dict[str, list[Any]]:
    """Transformers' unit vectors of TEXTS."""
    model, tokenizer = AutoModel.from_pretrained(tiny_llama, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(tiny_llama)
    vectors: dict[str, list[Any]] = {"last": [], "mean": []}
    for text in TEXTS:
        with torch.inference_mode():
            states = model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0]
        for pooling, vector in (("last", states[-1]), ("mean", states.mean(0))):
            vectors[pooling].append((vector / vector.norm()).numpy())
    return vectors


def test_the_openai_client(client: httpx.Client, expected: dict[str, list[Any]]) -> None:
    """It asks for base64 by itself, and decodes it."""
    theirs = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    answer = theirs.embeddings.create(model="tiny", input=TEXTS)
    assert [item.index for item in answer.data] == [0, 1]
    assert np.allclose([item.embedding for item in answer.data], expected["last"], atol=2e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 2
    plain = theirs.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(answer.data[0].embedding, abs=1e-7)


def test_shapes_of_the_input(client: httpx.Client) -> None:
    ids = post(client, "/tokenize", prompt=TEXTS[0])["tokens"]
    vectors = [post(client, PATH, input=value)["data"][0]["embedding"] for value in (TEXTS[0], [TEXTS[0]], ids, [ids])]
    for vector in vectors[1:]:
        assert vector == pytest.approx(vectors[0], abs=1e-6)
    answer = post(client, PATH, input=[ids, ids[:2], ids], model="tiny")
    assert answer["object"] == "list"
    assert answer["model"] == "tiny"
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    assert answer["usage"] == {"prompt_tokens": 2 * len(ids) + 2, "total_tokens": 2 * len(ids) + 2}


def test_pooling_encoding_and_dimensions(client: httpx.Client, expected: dict[str, list[Any]]) -> None:
    mean = post(client, PATH, input=TEXTS[1], pooling="mean")["data"][0]["embedding"]
    assert np.allclose(mean, expected["mean"][1], atol=2e-5)
    raw = post(client, PATH, input=TEXTS[1], pooling="mean", encoding_format="base64")["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(raw), dtype="<f4") == pytest.approx(mean, abs=1e-7)
    short = post(client, PATH, input=TEXTS[1], pooling="mean", dimensions=16)["data"][0]["embedding"]
    first = np.asarray(mean[:16])
    assert short == pytest.approx(first / np.linalg.norm(first))
    assert post(client, PATH, input=TEXTS[1], pooling="mean", dimensions=64)["data"][0]["embedding"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": "a", "dimensions": 65}, "dimensions"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "priority": 1}, "priority"),
        ({"input": ["a"] * 2000}, "input"),
    ],
)
def test_refusals(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = client.post(PATH, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_too_long(client: httpx.Client) -> None:
    assert client.post(PATH, json={"input": [[5] * 512]}).status_code == 200
    error = client.post(PATH, json={"input": [[1], [5] * 513]}).json()["error"]
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")


def test_a_client_that_leaves(own_llm: AsyncLLM, serve: Any) -> None:
    slow_down(own_llm, 0.3)
    with serve(own_llm) as client:
        with pytest.raises(httpx.TimeoutException):
            client.post(PATH, json={"input": ["a"] * 200}, timeout=0.5)
        wait_until_free(own_llm)


def test_a_model_that_breaks_is_an_error(serve: Any, tiny_llama: Path) -> None:
    llm = load(tiny_llama, graphs=False)
    norm = llm.engine.core.runner.model.model.norm
    with torch.inference_mode():
        norm.weight.fill_(float("nan"))
    with serve(llm) as client:
        response = client.post(PATH, json={"input": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (500, "model_error")
        assert client.get("/health").status_code == 200
    llm.shutdown()
