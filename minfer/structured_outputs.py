"""`StructuredOutputsParams`: the form that a request's output must have. Names are vLLM's, so scripts carry over.

Only the wish is here, as plain data; `minfer/guided` makes a grammar of it and keeps the sampler inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from minfer.errors import RequestError

StructureKind = Literal["json", "regex", "choice", "grammar"]

MAX_SOURCE_BYTES = 256 << 10  # of a schema or grammar: compiling takes time and memory in proportion


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """Exactly one of the fields; raises `RequestError` otherwise, or when it has the wrong type or is too large.

    json: a JSON Schema, as text or as a mapping. regex: an expression that the whole output matches (no look-around, no
    back-references). choice: the output is one of these strings. grammar: GBNF (llama.cpp's EBNF) or Lark text. json_object: any
    JSON object.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        if isinstance(self.json, Mapping):
            put(self, "json", _dumped(self.json))
        if self.choice is not None:
            ok = isinstance(self.choice, Sequence) and not isinstance(self.choice, str)
            if not ok or not self.choice or not all(isinstance(text, str) and text for text in self.choice):
                raise _invalid("choice must be a list of non-empty strings")
            put(self, "choice", tuple(self.choice))
        for name in ("json", "regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise _invalid(f"{name} must be {'a JSON Schema as an object or as' if name == 'json' else 'a'} text")
            if value == "":
                raise _invalid(f"{name} is empty")
        if self.json_object not in (None, False, True):
            raise _invalid("json_object must be true or false")
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            names = ", ".join(f.name for f in fields(self))
            raise _invalid(f"give exactly one of {names}" + (f", not {' and '.join(given)} together" if given else ""))
        size = len(self.source.encode("utf-8", "surrogatepass"))
        if size > MAX_SOURCE_BYTES:
            raise _invalid(f"{given[0]} has {size} bytes, and the limit is {MAX_SOURCE_BYTES}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> StructuredOutputsParams:
        """Builds one from a caller's dictionary, refusing names that are not fields."""
        known = [f.name for f in fields(cls)]
        unknown = [name for name, value in values.items() if name not in known and value not in (None, False)]
        if unknown:
            raise _invalid(f"unknown field {str(unknown[0])[:80]!r}; known are {', '.join(known)}")
        return cls(**{name: value for name, value in values.items() if name in known})

    @property
    def kind(self) -> StructureKind:
        if self.regex is not None:
            return "regex"
        if self.choice is not None:
            return "choice"
        return "json" if self.grammar is None else "grammar"

    @property
    def source(self) -> str:
        """The form as text; with `kind`, what a compiled grammar is cached by."""
        if self.choice is not None:
            return _dumped(self.choice)
        text = self.regex or self.grammar or (self.json if isinstance(self.json, str) else None)
        return text or '{"type":"object"}'


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise _invalid(f"the schema is not plain JSON: {error}") from error


def _invalid(reason: str) -> RequestError:
    return RequestError(f"structured_outputs: {reason}", param="structured_outputs")
