"""Forms of the output over HTTP: every spelling, whole and streamed; and what can't be compiled is a 400 that harms nobody."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema
import pytest
from http_helpers import chunks, post, streamed_text

from minfer import AsyncLLM

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3}
OBJECT = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}

FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "list", "strict": True, "schema": SCHEMA}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    {"guided_json": SCHEMA},
    {"json_schema": SCHEMA},
]


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_json_schema(client: httpx.Client, path: str, form: dict[str, Any]) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "hello"}
    body |= {"max_tokens": 60, "seed": 4, "n": 2, **form}
    whole = post(client, path, **body)
    texts = [choice["message"]["content"] if path == CHAT else choice["text"] for choice in whole["choices"]]
    for choice, text in zip(whole["choices"], texts, strict=True):
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    parts = chunks(client, path, **body)
    assert [streamed_text(parts, index) for index in (0, 1)] == texts


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"guided_regex": "[0-9]{4}"}, r"[0-9]{4}"),
        ({"structured_outputs": {"regex": "[0-9]{4}"}}, r"[0-9]{4}"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_grammar": 'root ::= "x" [yz]{2}'}, "x[yz]{2}"),
        ({"grammar": 'root ::= "x" [yz]{2}'}, "x[yz]{2}"),
        ({"response_format": {"type": "text"}}, ".*"),
        ({"response_format": None, "grammar": ""}, ".*"),
    ],
    ids=str,
)
def test_other_forms(client: httpx.Client, form: dict[str, Any], pattern: str) -> None:
    text = post(client, COMPLETE, prompt="hello", max_tokens=30, seed=1, **form)["choices"][0]["text"]
    assert re.fullmatch(pattern, text, re.DOTALL), text


def test_json_object(client: httpx.Client) -> None:
    answer = post(client, CHAT, messages=HELLO, max_tokens=40, seed=1, response_format={"type": "json_object"})["choices"][0]
    assert answer["message"]["content"].startswith("{")
    if answer["finish_reason"] == "stop":
        assert isinstance(json.loads(answer["message"]["content"]), dict)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "yaml"}}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "foo"}}}}, "response_format"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
    ({"structured_outputs": {"odd": 1}}, "structured_outputs"),
    ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_regex": "(?=a)"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "root ::= nowhere"}, "guided_grammar"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
    ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
    ({"guided_regex": "a" * 300_000}, "guided_regex"),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("form", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_bad_form_is_a_400_that_names_its_field(client: httpx.Client, form: dict[str, Any], param: str, stream: bool) -> None:
    response = client.post(CHAT, json={"messages": HELLO, "stream": stream, **form})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert 10 < len(error["message"]) < 400
    assert "\n" not in error["message"]


def test_neighbours_of_a_bad_form_go_on(client: httpx.Client, llm: AsyncLLM) -> None:
    with client.stream("POST", COMPLETE, json={"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert client.post(COMPLETE, json={"prompt": "a", "guided_json": {"type": 5}}).status_code == 400
        events = [line for line in lines if line]
    assert events[-1] == "data: [DONE]" and json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert llm.is_running
