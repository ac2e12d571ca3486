"""Tools over HTTP: told to the model, demanded by a grammar, read back whole and streamed; and refused where they make no sense."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from http_helpers import chunks, load, post, running
from tokenizers import Tokenizer as Backend
from tokenizers import models

from minfer.errors import RequestError
from minfer.guided import GrammarCompiler
from minfer.server.tools import read_tools
from minfer.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}
COLOUR = {
    "type": "object",
    "properties": {"first": {"$ref": "#/$defs/colour"}},
    "required": ["first"],
    "additionalProperties": False,
    "$defs": {"colour": {"enum": ["red", "blue"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "paint", "parameters": COLOUR}},
]
SPECIAL = ["<tool_call>", "</tool_call>"]
SCHEMAS = {"weather": CITY, "paint": COLOUR}


@pytest.fixture(scope="module")
def roomy(make_checkpoint: Callable[..., Path]) -> Iterator[httpx.Client]:
    """A tiny model with a context that holds the description of the tools, which its tokenizer spells almost letter by letter."""
    llm = load(make_checkpoint("llama", max_position_embeddings=2048), kv_cache_memory=16 << 20)
    with running(llm) as client:
        yield client
    llm.shutdown()


def check_calls(calls: list[dict[str, Any]]) -> None:
    assert calls
    for call in calls:
        assert call["type"] == "function" and call["id"].startswith("call_")
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}], ids=["required", "named"])
def test_a_demanded_call_comes_whole_and_streamed(roomy: httpx.Client, choice: Any) -> None:
    body: dict[str, Any] = {"messages": HELLO, "tools": TOOLS, "tool_choice": choice, "seed": 3, "max_tokens": 120, "n": 2}
    body["parallel_tool_calls"] = False
    whole = post(roomy, CHAT, **body)["choices"]
    for choice_ in whole:
        assert choice_["finish_reason"] == "tool_calls"
        assert choice_["message"]["content"] is None
        check_calls(choice_["message"]["tool_calls"])
        assert len(choice_["message"]["tool_calls"]) == 1
    if choice != "required":
        assert {c["message"]["tool_calls"][0]["function"]["name"] for c in whole} == {"paint"}
    parts = [choice for part in chunks(roomy, CHAT, **body) for choice in part["choices"]]
    for index in (0, 1):
        mine = [part for part in parts if part["index"] == index]
        calls = [call for part in mine for call in part["delta"].get("tool_calls", [])]
        check_calls(calls)
        assert [call["index"] for call in calls] == list(range(len(calls)))
        assert [c["function"] for c in calls] == [c["function"] for c in whole[index]["message"]["tool_calls"]]
        assert "".join(part["delta"].get("content") or "" for part in mine) == ""
        assert mine[-1]["finish_reason"] == "tool_calls"


def test_tools_that_are_not_called_leave_text_alone(roomy: httpx.Client) -> None:
    body: dict[str, Any] = {"messages": HELLO, "tools": TOOLS, "seed": 3, "max_tokens": 20}
    auto = post(roomy, CHAT, **body)["choices"][0]
    assert auto["message"]["content"] and "tool_calls" not in auto["message"]
    streamed = chunks(roomy, CHAT, **body)
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in streamed) == auto["message"]["content"]
    without = post(roomy, CHAT, messages=HELLO, seed=3, max_tokens=20)
    assert post(roomy, CHAT, **body, tool_choice="none")["choices"][0]["message"] == without["choices"][0]["message"]


def test_earlier_calls_and_their_results_may_be_in_the_conversation(roomy: httpx.Client) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
    ]
    assert post(roomy, CHAT, messages=messages, tools=TOOLS, max_tokens=3)["usage"]["prompt_tokens"] > 100


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}, TOOLS[0]], "tool_choice": "odd"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]}, "tools"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    ({"tools": TOOLS * 65}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "required", "guided_regex": "a"}, "guided_regex"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "odd"}}}], "tool_choice": "required"},
        "tools",
    ),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = client.post(CHAT, json={"messages": HELLO, **body})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def template(folder: Path, text: str, *special: str) -> Tokenizer:
    """A byte-level tokenizer whose chat template reads tools."""
    backend = Backend(models.BPE(vocab={chr(code): code - 32 for code in range(32, 127)} | {"Ġ": 95, "Ċ": 96}, merges=[]))
    from tokenizers import decoders, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", *special])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>", "chat_template": text}))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("text", "special", "reply"),
    [
        ("{{ tools }}<tool_call>", [], '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
        ("{{ tools }}<tool_call>", SPECIAL, '<tool_call>\n{"name": "paint", "arguments": {"first": "red"}}\n</tool_call>'),
        ("{{ tools }}[TOOL_CALLS]", ["[TOOL_CALLS]"], '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome"}}]'),
        ("{{ tools }} parameters <|python_tag|>", ["<|python_tag|>"], '{"name": "weather", "parameters": {"city": "Rome"}}'),
    ],
)  # fmt: skip
def test_the_grammar_is_the_templates_own_way(tmp_path: Path, text: str, special: list[str], reply: str) -> None:
    tokenizer = template(tmp_path, text, *special)
    tools = read_tools(TOOLS, "required", None, tokenizer)
    assert tools is not None and tools.in_template and tools.messages(HELLO) is HELLO
    wish = tools.grammar(tokenizer)
    assert wish is not None
    grammar = GrammarCompiler(tokenizer, tokenizer.eos_token_ids).compile(wish)
    ids = tokenizer.encode(reply, add_special_tokens=False)
    matcher = grammar.matcher()
    assert matcher.take_drafts(ids) == len(ids)
    assert matcher.ended or matcher.take_drafts(tokenizer.eos_token_ids[:1]) == 1, "the end may follow"
    wrong = tokenizer.encode(reply.replace("Rome", "Bonn").replace("red", "tin"), add_special_tokens=False)
    assert grammar.matcher().take_drafts(wrong) < len(wrong)


def test_a_model_without_a_tool_template_is_told_in_words(tmp_path: Path) -> None:
    tokenizer = template(tmp_path, "{{ messages }}")
    tools = read_tools(TOOLS, "auto", None, tokenizer)
    assert tools is not None and not tools.in_template and tools.grammar(tokenizer) is None
    (system, user) = tools.messages(HELLO)
    assert user is HELLO[0] and '"name": "weather"' in system["content"]
    (system, _) = tools.messages([{"role": "system", "content": "Be brief."}, *HELLO])
    assert system["content"].startswith("Be brief.\n\nYou may call")
    with pytest.raises(RequestError):
        read_tools(TOOLS, 5, None, tokenizer)
