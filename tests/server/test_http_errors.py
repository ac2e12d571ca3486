"""Every refusal has OpenAI's shape, the right status and a sentence that names the field; and it harms nobody."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]


def check(response: httpx.Response, status: int, param: str | None, code: str | None = None) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert response.headers["x-request-id"]
    return str(error["message"])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETE, {"prompt": 5}, "prompt"),
    (COMPLETE, {"prompt": ["a", [1]]}, "prompt"),
    (COMPLETE, {"prompt": None}, "prompt"),
    (COMPLETE, {"prompt": ""}, "prompt"),
    (COMPLETE, {"prompt": []}, "prompt"),
    (COMPLETE, {"prompt": [[]]}, "prompt"),
    (COMPLETE, {"prompt": [1, -1]}, "prompt"),
    (COMPLETE, {"prompt": [10**9]}, "prompt"),
    (COMPLETE, {"prompt": [10**40]}, "prompt"),
    (COMPLETE, {"prompt": "a", "max_tokens": "5"}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "max_tokens": True}, "max_tokens"),
    (COMPLETE, {"prompt": "a", "temperature": -1}, "temperature"),
    (COMPLETE, {"prompt": "a", "temperature": 10**400}, "temperature"),
    (COMPLETE, {"prompt": "a", "top_p": 0}, "top_p"),
    (COMPLETE, {"prompt": "a", "n": 0}, "n"),
    (COMPLETE, {"prompt": "a", "n": 10**6}, "n"),
    (COMPLETE, {"prompt": "a", "seed": 2**64}, "seed"),
    (COMPLETE, {"prompt": "a", "stop": [1]}, "stop"),
    (COMPLETE, {"prompt": "a", "stop": ["x"] * 100}, "stop"),
    (COMPLETE, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (COMPLETE, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    (COMPLETE, {"prompt": "a", "logit_bias": {"9999999": 1}}, "logit_bias"),
    (COMPLETE, {"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
    (COMPLETE, {"prompt": "a", "logit_bias": [1]}, "logit_bias"),
    (COMPLETE, {"prompt": "a", "stop_token_ids": [9999999]}, "stop_token_ids"),
    (COMPLETE, {"prompt": "a", "priority": 1}, "priority"),
    (COMPLETE, {"prompt": "a", "cache_salt": ""}, "cache_salt"),
    (COMPLETE, {"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    (COMPLETE, {"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    (COMPLETE, {"prompt": ["a"] * 2000}, "prompt"),
    (COMPLETE, {"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    (CHAT, {"messages": HELLO, "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    (CHAT, {"messages": HELLO, "continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("path", "body", "param"), REFUSED)
def test_refused_before_anything_starts(client: httpx.Client, path: str, body: dict[str, Any], param: str, stream: bool) -> None:
    if stream and "stream_options" in body:
        pytest.skip("a stream may have it")
    message = check(client.post(path, json={"stream": stream, **body}), 400, param)
    assert param.split("[")[0] in message or "prompt" in message


UNSUPPORTED = [
    {"functions": [{"name": "f"}]},
    {"structural_tag": {}},
    {"modalities": ["audio"]},
    {"audio": {"voice": "x"}},
    {"chat_template": "{{ 1 }}"},
    {"use_beam_search": True},
]


@pytest.mark.parametrize("body", UNSUPPORTED, ids=lambda body: next(iter(body)))
def test_what_is_not_supported_is_refused_by_name(client: httpx.Client, body: dict[str, Any]) -> None:
    name = next(iter(body))
    assert name in check(client.post(CHAT, json={"messages": HELLO, **body}), 400, name, "unsupported_parameter")
    for name, value in (("suffix", "x"), ("best_of", 3)):
        check(client.post(COMPLETE, json={"prompt": "a", name: value}), 400, name, "unsupported_parameter")


def test_what_asks_for_nothing_is_fine(client: httpx.Client) -> None:
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "user": "me", "odd": 1}
    assert client.post(CHAT, json={"messages": HELLO, "max_tokens": 1, **nothing}).status_code == 200
    assert client.post(COMPLETE, json={"prompt": "a", "max_tokens": 1, "best_of": 1, "suffix": ""}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_context_length(client: httpx.Client, stream: bool) -> None:
    """OpenAI's wording, both numbers; tools search for it, so it is frozen here."""
    response = client.post(COMPLETE, json={"prompt": [5] * 500, "max_tokens": 13, "stream": stream})
    assert check(response, 400, "prompt", "context_length_exceeded") == (
        "This model's maximum context length is 512 tokens. However, you requested 513 tokens (500 in the prompt, 13 in the completion). "
        "Please reduce the length of the prompt or completion."
    )
    assert client.post(COMPLETE, json={"prompt": [5] * 500, "max_tokens": 12, "stream": stream}).status_code == 200
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 5000}], "stream": stream})
    message = check(response, 400, "prompt", "context_length_exceeded")
    assert message.startswith("This model's maximum context length is 512 tokens. However, your prompt has ")


NOT_OBJECTS = [b"{", b"", b"[1]", b'"x"', b"null", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}"]


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda content: repr(content[:12]))
def test_bodies_that_are_no_json_object(client: httpx.Client, content: bytes) -> None:
    check(client.post(COMPLETE, content=content, headers={"content-type": "application/json"}), 400, None)


SURROGATES: list[tuple[str, dict[str, Any]]] = [
    (COMPLETE, {"prompt": "\ud800"}),
    (COMPLETE, {"prompt": "a", "model": "\ud800"}),
    (COMPLETE, {"prompt": "a", "\ud800": 1, "logit_bias": {"\ud800": 1}}),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}),
    (CHAT, {"messages": [{"role": "\ud800", "content": "a"}]}),
]


@pytest.mark.parametrize(("path", "body"), SURROGATES)
def test_lone_surrogates(client: httpx.Client, path: str, body: dict[str, Any]) -> None:
    """JSON can spell them and UTF-8 can't: a refusal must not fail on quoting one."""
    response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["message"]


def test_routes(client: httpx.Client) -> None:
    check(client.get("/nope"), 404, None, "route_not_found")
    check(client.get(CHAT), 405, None, "method_not_allowed")
    check(client.post("/v1/responses", json={}), 404, None, "route_not_found")
    check(client.post(COMPLETE, data={"prompt": "a"}), 415, None)
    check(client.post(COMPLETE, json={"prompt": "a", "model": "gpt-4"}), 404, "model", "model_not_found")
    check(client.get("/v1/models/gpt-4"), 404, "model", "model_not_found")


def test_work_is_limited(serve: Any, llm: Any) -> None:
    with serve(llm, max_request_tokens=100, max_request_sequences=6) as client:
        check(client.post(COMPLETE, json={"prompt": ["a", "b"], "n": 2, "max_tokens": 26}), 400, "max_tokens")
        check(client.post(COMPLETE, json={"prompt": ["a", "b"], "n": 4, "max_tokens": 1}), 400, "n")
        check(client.post(CHAT, json={"messages": HELLO, "n": 2}), 400, "max_tokens")
        assert client.post(COMPLETE, json={"prompt": ["a", "b"], "n": 2, "max_tokens": 25}).status_code == 200
