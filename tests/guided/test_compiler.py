"""What can't be compiled is the caller's mistake, said in one sentence; what can is compiled once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minfer.errors import RequestError
from minfer.guided import GrammarCompiler
from minfer.structured_outputs import MAX_SOURCE_BYTES, StructuredOutputsParams
from minfer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [2])


BAD: list[dict[str, Any]] = [
    {"json": {"type": "foo"}},
    {"json": {"$ref": "#/nowhere"}},
    {"json": {"type": "string", "pattern": "("}},
    {"json": "{"},
    {"json": "[]"},
    {"json": '{"a":"\\ud800"}'},
    {"json": '{"items":' * 3000 + "{}" + "}" * 3000},
    {"json": {"oneOf": [{"type": "string", "pattern": "a.*"}, {"type": "string", "pattern": ".*b"}]}},
    {"regex": "("},
    {"regex": "(?=a)b"},
    {"regex": "\ud800"},
    {"regex": "(" * 20_000 + ")" * 20_000},
    {"choice": ["\ud800"]},
    {"grammar": "root ::= nowhere"},
    {"grammar": "hello"},
    {"grammar": "\x00"},
    {"grammar": "start: nowhere"},
    {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
    {"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000},
]


@pytest.mark.parametrize("wish", BAD, ids=lambda wish: str(wish)[:40])
def test_a_bad_form_is_one_sentence(compiler: GrammarCompiler, wish: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        compiler.compile(StructuredOutputsParams(**wish))
    assert refused.value.param == "structured_outputs"
    assert 10 < len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=5
)
KEYWORDS = ["type", "properties", "items", "enum", "const", "anyOf", "allOf", "$ref", "$defs", "minLength", "maxItems", "pattern", "format"]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.dictionaries(st.sampled_from(KEYWORDS), JSON | st.dictionaries(st.sampled_from(KEYWORDS), JSON), max_size=4))
def test_any_json_is_a_grammar_or_a_refusal(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    with contextlib.suppress(RequestError):  # anything else is a bug
        compiler.compile(StructuredOutputsParams(json=schema))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(["regex", "grammar"]), text=st.text(alphabet='ab(){}[]|*+?.:="\\ \nroot%&~/-<>1', min_size=1, max_size=40))
def test_any_text_is_a_grammar_or_a_refusal(compiler: GrammarCompiler, kind: str, text: str) -> None:
    with contextlib.suppress(RequestError):
        compiler.compile(StructuredOutputsParams(**{kind: text}))


def test_a_grammar_is_compiled_once_and_the_oldest_forgotten(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, [2], keep=2)
    a, b, c = (StructuredOutputsParams(choice=[text]) for text in "abc")
    first = compiler.compile(a)
    compiler.compile(b)
    assert compiler.compile(StructuredOutputsParams(choice=["a"])) is first
    assert (compiler.num_compiled, compiler.num_reused) == (2, 1)
    compiler.compile(c)  # forgets b
    assert compiler.compile(a) is first
    compiler.compile(b)
    assert compiler.num_compiled == 4


def test_no_tokenizer_no_grammar() -> None:
    with pytest.raises(RequestError, match="needs a tokenizer"):
        GrammarCompiler(None, [2]).compile(StructuredOutputsParams(choice=["a"]))


def test_without_the_library_the_error_names_the_extra(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"minfer\[guided\]"):
        GrammarCompiler(tokenizer, [2]).compile(StructuredOutputsParams(choice=["a"]))


def test_the_source_is_limited() -> None:
    with pytest.raises(RequestError, match="the limit is"):
        StructuredOutputsParams(json=json.dumps({"const": "x" * MAX_SOURCE_BYTES}))
