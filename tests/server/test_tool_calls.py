"""The parser's law: however a reply is cut into pieces, the same text and the same calls come out, and nothing is lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minfer.server.tool_calls import ToolParser, ToolSyntax, detect_syntax


def parse(syntax: ToolSyntax, pieces: list[str]) -> tuple[str, list[tuple[str, object]]]:
    parser = ToolParser(syntax)
    text, calls = "", []
    for piece in pieces:
        shown, new = parser.feed(piece)
        text += shown
        calls += [(call.name, json.loads(call.arguments)) for call in new]
    assert parser.num_calls == len(calls)
    return text + parser.finish(), calls


A = '{"name": "f", "arguments": {"s": "a } \\" <tool_call> [", "n": [1, {"x": 2}]}}'
B = '{"name": "g", "arguments": {}}'
FA = ("f", {"s": 'a } " <tool_call> [', "n": [1, {"x": 2}]})
FB: tuple[str, object] = ("g", {})
LLAMA = B.replace("arguments", "parameters")

CASES: list[tuple[ToolSyntax, str, str, list[tuple[str, object]]]] = [
    ("hermes", "Hello.", "Hello.", []),
    ("hermes", "a < b <tool_c> \n ", "a < b <tool_c> \n ", []),
    ("hermes", f"<tool_call>\n{A}\n</tool_call>", "", [FA]),
    ("hermes", f"Let me see.\n<tool_call>{A}</tool_call>\n<tool_call>\n{B}\n</tool_call>\n", "Let me see.", [FA, FB]),
    ("hermes", f"<tool_call>{B}</tool_call> and done", " and done", [FB]),
    ("hermes", f"<tool_call>{B}", "", [FB]),
    ("hermes", "<tool_call>nonsense</tool_call>", "<tool_call>nonsense</tool_call>", []),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    ("hermes", '<tool_call>{"nom": 1}</tool_call>', '<tool_call>{"nom": 1}</tool_call>', []),
    ("mistral", f"[TOOL_CALLS] [{A}, {B}]", "", [FA, FB]),
    ("mistral", f"Sure. [TOOL_CALLS][{B}]", "Sure.", [FB]),
    ("mistral", "An array [1] of things", "An array [1] of things", []),
    ("mistral", '[TOOL_CALLS][{"name"', '[TOOL_CALLS]{"name"', []),
    ("llama", LLAMA, "", [FB]),
    ("llama", f"<|python_tag|>{LLAMA}; {LLAMA}", "", [FB, FB]),
    ("llama", "Hello {there}", "Hello {there}", []),
    ("llama", '{"no": "call"} at all', '{"no": "call"} at all', []),
    ("llama", "<|py", "<|py", []),
]


@pytest.mark.parametrize(("syntax", "said", "text", "calls"), CASES)
def test_whole_and_character_by_character(syntax: ToolSyntax, said: str, text: str, calls: list[tuple[str, object]]) -> None:
    assert parse(syntax, [said]) == (text, calls)
    assert parse(syntax, list(said)) == (text, calls)


PIECES = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    A,
    B,
    LLAMA,
    "[",
    "]",
    ", ",
    "{",
    '"',
    "\\",
    " ",
    "\n",
    "word",
    "<tool",
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(syntax=st.sampled_from(["hermes", "mistral", "llama"]), said=st.lists(st.sampled_from(PIECES), max_size=8), data=st.data())
def test_any_cut_gives_the_same(syntax: ToolSyntax, said: list[str], data: st.DataObject) -> None:
    whole = "".join(said)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    assert parse(syntax, pieces) == parse(syntax, [whole])


def test_the_template_tells_the_syntax() -> None:
    assert detect_syntax(None) == "hermes"
    assert detect_syntax("{{ '<tool_call>' }} {{ parameters }}") == "hermes"
    assert detect_syntax("[AVAILABLE_TOOLS] [TOOL_CALLS]") == "mistral"
    assert detect_syntax('Respond in the format {"name": function name, "parameters": dictionary}') == "llama"
