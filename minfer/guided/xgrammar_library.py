"""xgrammar behind `Library`: the one that other servers use, for those who want to compare.

xgrammar compiles schemas whose keywords it then ignores (`not`, `uniqueItems`, `contains`, ...): in the JSON-Schema test suite it lets
invalid instances through in nearly half of the groups. So `problem` comes first: only keywords that it honours pass, each beside the
type that it is for, and the rest is the caller's 400, as it is with llguidance. What passes is read strictly: objects hold what the
schema names.

It has no limits on the work of compiling; a caller waits `COMPILE_SECONDS` at most, but the thread goes on. Where strangers send
schemas, llguidance is the better choice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from minfer.guided.grammars import MOST_WHITESPACE, invalid_grammar
from minfer.structured_outputs import StructuredOutputsParams
from minfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import xgrammar

MOST_BRACKETS = 100
ANYWHERE = frozenset({"type", "enum", "const", "anyOf", "$ref", "$defs", "definitions"})
SAYS_NOTHING = frozenset(
    {"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "readOnly", "writeOnly"}
)
BY_TYPE = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"format"}),  # lengths and patterns let raw control characters into the text, which is no JSON then
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
FORMATS = frozenset({"date", "time", "date-time", "email", "uuid", "ipv4", "ipv6", "hostname"})
ALONE = ("enum", "const", "anyOf", "$ref")  # xgrammar looks at one of these and at nothing beside it


def problem(schema: Any) -> str | None:
    """What of a schema xgrammar would not honour; None if all of it."""
    if isinstance(schema, bool) or not isinstance(schema, Mapping):
        return None if schema is True else f"{json.dumps(schema)[:40]} as a schema is not supported"
    said = {name for name in schema if name not in SAYS_NOTHING}
    kind = schema.get("type")
    fitting = BY_TYPE.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
    for name in said:
        if name not in ANYWHERE and name not in fitting:
            known = any(name in names for names in BY_TYPE.values())
            return f'{name} needs its "type" beside it' if known else f"{name} is not supported"
    for name in ALONE:
        beside = said - {name, "type", "$defs", "definitions"}
        if name in said and beside:
            return f"{name} beside {sorted(beside)[0]} is not supported"
    if "format" in said and str(schema["format"]) not in FORMATS:
        return f"the format {str(schema['format'])[:40]!r} is not supported"
    return next((found for found in map(problem, _inner(schema)) if found is not None), None)


def _inner(schema: Mapping[str, Any]) -> Iterator[Any]:
    """The schemas inside a schema."""
    for name in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(name), Mapping):
            yield from schema[name].values()
    for name in ("anyOf", "prefixItems"):
        if isinstance(schema.get(name), list):
            yield from schema[name]
    if "items" in schema:
        yield schema["items"]
    if isinstance(schema.get("additionalProperties"), Mapping):
        yield schema["additionalProperties"]


class XGrammar:
    """The tables of the vocabulary are made for the first grammar."""

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = list(eos)
        self._compiler: xgrammar.GrammarCompiler | None = None
        self._lock = threading.Lock()
        self._threads: xgrammar.BatchGrammarMatcher | None = None

    @property
    def num_tokens(self) -> int:
        return self._tokenizer.vocab_size

    def start(self, wish: StructuredOutputsParams) -> XGrammarMatcher:
        from xgrammar import GrammarMatcher

        _check_depth(wish)
        try:
            return XGrammarMatcher(GrammarMatcher(self._compile(wish)), self._tokenizer)
        except (RuntimeError, ValueError) as error:  # ValueError: no JSON; a lone surrogate
            raise invalid_grammar(wish, str(error)) from error

    def fill(self, matchers: Sequence[XGrammarMatcher], bits: Tensor) -> None:
        going = [(row, matcher.inner) for row, matcher in enumerate(matchers) if not matcher.ended]
        for row, matcher in enumerate(matchers):
            if matcher.ended and matcher.failure is None:
                for token in self._eos:
                    bits[row, token // 32] |= np.int32(np.uint32(1 << token % 32)).item()
        if len(going) == 1:
            row, inner = going[0]
            inner.fill_next_token_bitmask(bits, row)
        elif going:
            if self._threads is None:
                from xgrammar import BatchGrammarMatcher

                self._threads = BatchGrammarMatcher()
            self._threads.batch_fill_next_token_bitmask([inner for _, inner in going], bits, [row for row, _ in going])

    def _compile(self, wish: StructuredOutputsParams) -> xgrammar.CompiledGrammar:
        compiler, source = self._tables(), wish.source
        if wish.kind == "json":
            schema = json.loads(source)
            found = problem(schema)
            if found is not None:
                raise ValueError(f"{found} by xgrammar; --guided-backend llguidance knows more")
            # Strict: an unnamed property could have a named one's name, and so a value of another type.
            named = '"properties"' in source
            return compiler.compile_json_schema(source, strict_mode=named, max_whitespace_cnt=MOST_WHITESPACE)
        if wish.kind == "regex":
            return compiler.compile_regex(source)
        if wish.kind == "choice":
            return compiler.compile_grammar("root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(source)))
        return compiler.compile_grammar(source) if "::=" in source else compiler.compile_lark(source)

    def _tables(self) -> xgrammar.GrammarCompiler:
        from xgrammar import GrammarCompiler, TokenizerInfo

        with self._lock:
            if self._compiler is None:
                known = self._tokenizer
                # A token without bytes is special to it: no part of any text.
                texts = [b"" if known.is_special(token) else known.token_bytes(token) for token in range(known.vocab_size)]
                info = TokenizerInfo(texts, vocab_size=known.vocab_size, stop_token_ids=self._eos)
                self._compiler = GrammarCompiler(info, max_threads=1, cache_enabled=False)
            return self._compiler


class XGrammarMatcher:
    def __init__(self, inner: xgrammar.GrammarMatcher, tokenizer: Tokenizer) -> None:
        self.inner = inner
        self.failure: str | None = None
        self._tokenizer = tokenizer

    @property
    def ended(self) -> bool:
        return self.failure is not None or self.inner.is_terminated()

    def take(self, token: int) -> None:
        if not self.inner.accept_token(token):
            self.failure = f"the grammar forbids the token {token}"

    def take_drafts(self, tokens: Sequence[int]) -> int:
        return next((index for index, token in enumerate(tokens) if not self.inner.accept_token(token)), len(tokens))

    def give_back(self, count: int) -> None:
        self.inner.rollback(count)

    def branch(self) -> XGrammarMatcher:
        other = XGrammarMatcher(self.inner.fork(), self._tokenizer)
        other.failure = self.failure
        return other

    def forced(self) -> list[int]:
        text = self.inner.find_jump_forward_string()
        ids = self._tokenizer.encode(text, add_special_tokens=False, parse_special=False) if text else []
        return ids[:-1]  # the last one may go on in what is free


def _check_depth(wish: StructuredOutputsParams) -> None:
    """Its parsers call themselves for each bracket, and a stack that overflows would end the process."""
    depth = deepest = 0
    for character in wish.source:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    if deepest > MOST_BRACKETS:
        raise invalid_grammar(wish, f"it is nested {deepest} deep, and xgrammar is given at most {MOST_BRACKETS}")
