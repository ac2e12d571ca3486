"""Whatever a client sends, the answer is an answer or a refusal: never a 5xx, and never a harmed engine."""

from __future__ import annotations

import gc
import json
from typing import Any

import httpx
import pytest
from http_helpers import post
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minfer import AsyncLLM
from minfer.server.protocol import UNSUPPORTED, ChatCompletionRequest, CompletionRequest

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
NUMBERS: list[Any] = [0, 1, -1, 2, 20, 511, 512, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, 1.0, -0.0, 1e-320, 1e-45, 3.5e38, 1e308]
JUNK: list[Any] = [
    *NUMBERS,
    float("nan"),
    float("inf"),
    None,
    True,
    False,
    "",
    "a",
    "\x00",
    "\ud800",
    "é" * 50,
    [],
    [0],
    ["a"],
    [None],
    [[1]],
]
JUNK += [{}, {"a": 1}, {"5": 1}, {"5": 1e-300}, {"-1": 0}, {"²": 1}, {"role": "user", "content": "x"}, [{"role": "user", "content": None}]]
SAFE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2},
    COMPLETE: {"prompt": "hello", "max_tokens": 2},
}
FIELDS = {
    CHAT: sorted({*ChatCompletionRequest.model_fields, *UNSUPPORTED, "unknown"}),
    COMPLETE: sorted({*CompletionRequest.model_fields, *UNSUPPORTED, "unknown"}),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_junk_in_any_field(client: httpx.Client, llm: AsyncLLM, path: str, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(FIELDS[path]), st.sampled_from(JUNK), min_size=1, max_size=3))
    content = json.dumps({**SAFE[path], **changes})
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400, 404), (content, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    elif not changes.get("stream"):
        assert response.json()["choices"]
    else:
        assert response.text.endswith("data: [DONE]\n\n")
    assert llm.is_running


@pytest.fixture(scope="module")
def no_garbage() -> None:
    """Engines of other tests: their finalizers would fail if they ran deep in the recursion that is provoked here."""
    gc.collect()


@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize("depth", [100, 600, 900])
@pytest.mark.parametrize("where", ["messages", "chat_template_kwargs", "response_format", "prompt", "unknown"])
def test_deep_nesting(client: httpx.Client, where: str, depth: int) -> None:
    deep = '{"a":' * depth + "1" + "}" * depth
    values = {"messages": '[{"role":"user","content":"x","extra":' + deep + "}]", "prompt": "[" * depth + "]" * depth}
    path = COMPLETE if where == "prompt" else CHAT
    fields = {**{name: json.dumps(value) for name, value in SAFE[path].items()}, where: values.get(where, deep)}
    content = "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"
    response = client.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), response.text


def test_every_number_at_its_edges(client: httpx.Client, llm: AsyncLLM) -> None:
    """Values that are allowed but extreme must not make a distribution that can't be drawn from."""
    for name in ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "top_k"):
        for value in NUMBERS:
            body = {"prompt": "hello", "max_tokens": 3, "ignore_eos": True, "seed": 1, name: value}
            response = client.post(COMPLETE, content=json.dumps(body), headers={"content-type": "application/json"})
            assert response.status_code in (200, 400), (body, response.text)
    assert llm.is_running
    assert post(client, COMPLETE, prompt="a", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
