"""A request's form as llguidance's own grammar text: the step in which a mistake of the caller is found or passed on.

Whitespace between the tokens of JSON is capped: a small model that has lost its thread likes to produce spaces until `max_tokens`,
which is valid JSON so far and never becomes any.
"""

from __future__ import annotations

import json

from minfer.errors import RequestError
from minfer.structured_outputs import StructuredOutputsParams

MOST_WHITESPACE = 16  # enough to indent eight levels by two
WHITESPACE = rf"[\x20\x0A\x0D\x09]{{1,{MOST_WHITESPACE}}}"


def grammar_text(wish: StructuredOutputsParams) -> str:
    """Raises RequestError for what isn't even well-formed; the rest is found when it is compiled."""
    from llguidance import LLMatcher

    source = wish.source
    try:
        if wish.kind == "json":
            return LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": WHITESPACE})
        if wish.kind == "regex":
            return LLMatcher.grammar_from_regex(source)
        if wish.kind == "choice":
            return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in json.loads(source)))
        return LLMatcher.grammar_from_lark(_as_lark(source))
    except ValueError as error:  # also UnicodeEncodeError, for a lone surrogate
        raise invalid_grammar(wish, str(error)) from error


def _as_lark(source: str) -> str:
    """GBNF translated; Lark as it is."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(source)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except Exception as error:  # the translator raises its own kind for syntax, and a bare Exception for an unknown rule
        raise ValueError(str(error)) from error


def invalid_grammar(wish: StructuredOutputsParams, reason: str) -> RequestError:
    """The 400 for a form that can't be compiled: one line, with as much of the library's reason as fits."""
    what = {"json": "the JSON schema", "regex": "the regular expression", "choice": "the choice", "grammar": "the grammar"}[wish.kind]
    line = " ".join(reason.split())
    shown = line if len(line) <= 300 else line[:297] + "..."
    return RequestError(f"{what} can't be used: {shown}", param="structured_outputs", code="invalid_grammar")
