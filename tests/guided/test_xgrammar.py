"""xgrammar as the library: what it would ignore is refused, and what passes gives no invalid instance."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minfer import LLM, SamplingParams
from minfer.errors import RequestError
from minfer.guided import GrammarCompiler
from minfer.guided.xgrammar_library import problem
from minfer.structured_outputs import StructuredOutputsParams
from minfer.tokenizer import Tokenizer

EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_tokenizer)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [EOS], backend="xgrammar")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"not": {"type": "string"}}, "not is not supported"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems is not supported"),
    ({"type": "array", "contains": {"type": "integer"}}, "contains is not supported"),
    ({"type": "integer", "multipleOf": 5}, "multipleOf is not supported"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf is not supported"),
    ({"minimum": 5}, 'minimum needs its "type" beside it'),
    ({"properties": {"a": {"type": "integer"}}}, 'properties needs its "type" beside it'),
    ({"type": ["string", "integer"], "minimum": 5}, 'minimum needs its "type" beside it'),
    ({"type": "string", "format": "iri"}, "the format 'iri' is not supported"),
    ({"type": "string", "maxLength": 2}, "maxLength is not supported"),
    ({"type": "string", "pattern": "a+"}, "pattern is not supported"),
    ({"type": "integer", "enum": [1, 2], "minimum": 2}, "enum beside minimum is not supported"),
    ({"$ref": "#/$defs/a", "type": "integer", "minimum": 1, "$defs": {"a": {"type": "integer"}}}, "$ref beside minimum"),
    ({"type": "object", "properties": {"a": {"type": "array", "items": {"if": {}}}}}, "if is not supported"),
    ({"type": "object", "patternProperties": {"^a": {"type": "integer"}}}, "patternProperties is not supported"),
]


@pytest.mark.parametrize(("schema", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_it_would_ignore_is_refused(compiler: GrammarCompiler, schema: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=re.escape(why)) as refused:
        compiler.compile(StructuredOutputsParams(json=schema))
    assert refused.value.code == "invalid_grammar"


BAD: list[dict[str, Any]] = [
    {"json": {"type": "foo"}},
    {"json": "{"},
    {"json": '{"type":"array","items":' * 3000 + "{}" + "}" * 3000},
    {"regex": "("},
    {"regex": "(" * 20_000 + ")" * 20_000},
    {"grammar": "root ::= nowhere"},
    {"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000},
    {"grammar": "\x00"},
    {"choice": ["\ud800"]},
    {"regex": "\ud800"},
]


@pytest.mark.parametrize("wish", BAD, ids=lambda wish: str(wish)[:40])
def test_a_bad_form_is_one_sentence(compiler: GrammarCompiler, wish: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        compiler.compile(StructuredOutputsParams(**wish))
    assert refused.value.param == "structured_outputs"
    assert 10 < len(str(refused.value)) < 400


def walk(compiler: GrammarCompiler, tokenizer: Tokenizer, wish: StructuredOutputsParams, rng: random.Random, most: int = 150) -> str | None:
    """A text of tokens drawn at random among those that the masks allow; None if it had no end after `most`."""
    grammar = compiler.compile(wish)
    matcher, ids = grammar.matcher(), []
    for _ in range(most):
        bits = torch.zeros(1, -(-grammar.library.num_tokens // 32), dtype=torch.int32)
        grammar.library.fill([matcher], bits)
        allowed = [token for token in range(grammar.library.num_tokens) if bits[0, token // 32].item() >> token % 32 & 1]
        assert allowed, "a dead end"
        token = EOS if EOS in allowed and rng.random() < 0.5 else rng.choice(allowed)
        if token == EOS:
            return tokenizer.decode(ids)
        assert not tokenizer.is_special(token)
        matcher.take(token)
        assert matcher.failure is None
        ids.append(token)
    return None


SCALARS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "string"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "integer", "minimum": -5, "maximum": 17},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 12},
    {"type": "number", "minimum": 0, "maximum": 2.5},
    {"enum": ["red", 5, None]},
    {"const": {"a": [1]}},
    {"type": ["boolean", "null"]},
]


def schemas(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def thing(properties: dict[str, Any], needed: list[bool], more: bool) -> dict[str, Any]:
        required = [name for name, need in zip(properties, needed, strict=False) if need]
        return {"type": "object", "properties": properties, "required": required, **({"additionalProperties": False} if more else {})}

    lists = st.tuples(inner, st.integers(0, 2)).map(lambda p: {"type": "array", "items": p[0], "minItems": p[1], "maxItems": p[1] + 1})
    objects = st.builds(
        thing, st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=3), st.lists(st.booleans(), max_size=3), st.booleans()
    )
    return lists | objects | st.lists(inner, min_size=1, max_size=3).map(lambda each: {"anyOf": each})


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schema=st.recursive(st.sampled_from(SCALARS), schemas, max_leaves=4), seed=st.integers(0, 1000))
def test_whatever_it_allows_is_valid(compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], seed: int) -> None:
    assert problem(schema) is None
    text = walk(compiler, tokenizer, StructuredOutputsParams(json=schema), random.Random(seed))
    if text is not None:
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker(["date"]))


@pytest.mark.parametrize(
    ("wish", "pattern"),
    [
        ({"regex": r"[a-c]{2}-[0-9]"}, r"[a-c]{2}-[0-9]"),
        ({"choice": ["yes", 'no, "never"', "\u00e9\n"]}, 'yes|no, "never"|\u00e9\n'),
        ({"grammar": 'root ::= "<" [a-c] ("," [a-c]){2} ">"\n'}, r"<[a-c](,[a-c]){2}>"),
        ({"grammar": "start: /[a-c]{3}/ NUMBER\nNUMBER: /[0-9]{2}/\n"}, r"[a-c]{3}[0-9]{2}"),
    ],
)
def test_other_forms(compiler: GrammarCompiler, tokenizer: Tokenizer, wish: dict[str, Any], pattern: str) -> None:
    for seed in range(5):
        text = walk(compiler, tokenizer, StructuredOutputsParams(**wish), random.Random(seed))
        assert text is not None and re.fullmatch(pattern, text), text


def test_through_the_engine(smollm2_gguf: Path) -> None:
    """On the real model, sampled: valid, with forced tokens together, alike alone and beside others."""
    schema = {"type": "object", "properties": {"identification": {"enum": ["first", "second"]}, "age": {"type": "integer", "maximum": 99}}}
    schema |= {"required": ["identification", "age"], "additionalProperties": False}
    texts = []
    for forced in ("on", "off"):
        llm = LLM(str(smollm2_gguf), max_model_len=256, max_num_seqs=8, guided_backend="xgrammar", forced_tokens=forced)
        params = [SamplingParams(max_tokens=60, temperature=t, seed=1, structured_outputs={"json": schema}) for t in (0.0, 1.5)]
        texts.append([o.outputs[0].text for o in llm.generate(["Who?"] * 2, params, use_tqdm=False)])
        if forced == "on":
            assert llm.engine.core.forced is not None and llm.engine.core.forced.stats.num_accepted_tokens > 0
    assert texts[0] == texts[1]
    for text in texts[0]:
        jsonschema.validate(json.loads(text), schema)
