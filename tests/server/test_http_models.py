"""/v1/models and what a model may be called; priorities; unknown fields."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import load

from minfer import AsyncLLM
from minfer.server.protocol import MAX_LOGGED_FIELDS, CompletionRequest, UnknownFields

COMPLETE = "/v1/completions"


def test_models(client: httpx.Client, tiny_llama: Path) -> None:
    answer = client.get("/v1/models").json()
    assert answer["object"] == "list"
    (model,) = answer["data"]
    assert model == client.get("/v1/models/tiny").json()
    assert isinstance(model.pop("created"), int)
    assert model == {"id": "tiny", "object": "model", "owned_by": "minfer", "root": str(tiny_llama), "parent": None, "max_model_len": 512}


def test_names(serve: Any, llm: AsyncLLM, tiny_llama: Path) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    with serve(llm, served_model_name=None) as client:
        assert client.get("/v1/models").json()["data"][0]["id"] == str(tiny_llama)
        assert client.post(COMPLETE, json={**body, "model": str(tiny_llama)}).status_code == 200
    with serve(llm, any_model_name=True) as client:
        answer = client.post(COMPLETE, json={**body, "model": "gpt-4"}).json()
        assert answer["model"] == "tiny", "the answer says who it is from"


def test_the_openapi_document_is_served(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    assert {"/health", "/v1/models", COMPLETE, "/v1/chat/completions"} <= set(document["paths"])
    assert client.get("/docs").status_code == 404


def test_priority_needs_its_policy(serve: Any, tiny_llama: Path) -> None:
    llm = load(tiny_llama, policy="priority")
    with serve(llm) as client:
        assert client.post(COMPLETE, json={"prompt": "a", "max_tokens": 1, "priority": -5}).status_code == 200
    llm.shutdown()


def test_unknown_fields_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    unknown = UnknownFields()
    body = {"prompt": "a", "odd": 1, "tools": None, "user": "x", "metadata": {}, "stream_options": {"other\n": 1}}
    with caplog.at_level(logging.WARNING, "minfer.server"):
        for _ in range(3):
            unknown.note(CompletionRequest.model_validate(body))
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 2
        assert "'odd'" in messages[0]
        assert "\n" not in messages[1]
        for number in range(2 * MAX_LOGGED_FIELDS):
            unknown.note(CompletionRequest.model_validate({"prompt": "a", f"odd{number}": 1}))
    assert len(caplog.records) == MAX_LOGGED_FIELDS
