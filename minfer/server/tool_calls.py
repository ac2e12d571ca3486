"""Tool calls in what a model says: three ways of writing them, and a parser that reads a stream.

    hermes   text <tool_call>{"name": ..., "arguments": {...}}</tool_call> ...     Hermes, Qwen, and models without a format of their own
    mistral  text [TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]             Mistral
    llama    {"name": ..., "parameters": {...}}; ...                               Llama 3: the whole reply, or none of it

A stream tells text as soon as it can't be the beginning of a call any more, and a call when its JSON is complete: its arguments come in
one piece. What looks like a call and isn't one (no JSON, no name) is text after all; nothing that the model said is lost.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

ToolSyntax = Literal["hermes", "mistral", "llama"]

MARKERS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama": "<|python_tag|>"}
HERMES_END = "</tool_call>"
_BETWEEN = " \r\n\t[,;]"  # what stands around calls


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str  # JSON text, as OpenAI has it
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def plain(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def detect_syntax(template: str | None) -> ToolSyntax:
    """The way of writing that a chat template teaches."""
    if template is not None and MARKERS["mistral"] in template:
        return "mistral"
    if template is not None and MARKERS["hermes"] not in template and (MARKERS["llama"] in template or '"parameters"' in template):
        return "llama"
    return "hermes"


class ToolParser:
    """One reply on its way out: `feed` what is new, then `finish`; the text to show and the calls that are complete."""

    def __init__(self, syntax: ToolSyntax) -> None:
        self.syntax = syntax
        self.num_calls = 0
        self._marker = MARKERS[syntax]
        self._state: Literal["start", "text", "calls", "only text"] = "start" if syntax == "llama" else "text"
        self._held = ""  # not decided yet
        self._end = ""  # the closing marker that may follow
        self._json = _JsonEnd()

    def feed(self, text: str) -> tuple[str, list[ToolCall]]:
        shown, calls = "", []
        self._held += text
        steps = {"start": self._begin, "text": self._seek, "calls": self._read, "only text": self._pass}
        while (step := steps[self._state]()) is not None:
            shown += step if isinstance(step, str) else ""
            if isinstance(step, ToolCall):
                calls.append(step)
                self.num_calls += 1
        return shown, calls

    def finish(self) -> str:
        """What was held back for a call that never came."""
        rest, self._held = self._held, ""
        if self.num_calls and not rest.strip(_BETWEEN):
            return ""
        cut = self._state == "calls" and not (self.syntax == "mistral" and self.num_calls)
        return self._marker + rest if cut and self.syntax != "llama" else rest

    # Each step does one thing to what is held: returns text to show, a call, or None when it needs more.

    def _begin(self) -> str | None:
        """llama: the reply's first character says what it is."""
        start = self._held.lstrip().removeprefix(self._marker).lstrip()
        if not start or self._marker.startswith(start):
            return None
        self._state = "calls" if start[0] == "{" else "only text"
        return ""

    def _pass(self) -> str | None:
        shown, self._held = self._held, ""
        return shown or None

    def _seek(self) -> str | None:
        """Text, up to a marker. Its last spaces wait: before a call they are layout."""
        if self._end:
            rest = self._held.lstrip()
            if self._end.startswith(rest) and rest != self._end:
                return None
            self._held = rest.removeprefix(self._end)
            self._end = ""
        at = self._held.find(self._marker)
        if at >= 0:
            shown, self._held = self._held[:at].rstrip(), self._held[at + len(self._marker) :]
            self._state, self._json = "calls", _JsonEnd()
            return shown
        certain = len(self._held[: len(self._held) - _overlap(self._held, self._marker)].rstrip())
        shown, self._held = self._held[:certain], self._held[certain:]
        return shown or None

    def _read(self) -> ToolCall | str | None:
        """A JSON value, and what it is."""
        if self._json.position == 0:
            start = self._held.lstrip().removeprefix(self._marker) if self.syntax == "llama" else self._held
            self._held = start.lstrip(" \r\n\t" if self.syntax == "hermes" else _BETWEEN)
        end = self._json.find(self._held)
        if end is None:
            return None
        raw, self._held = self._held[:end], self._held[end:]
        self._json = _JsonEnd()
        call = _as_call(raw)
        if self.syntax == "hermes":
            self._state, self._end = "text", HERMES_END if call is not None else ""
        elif call is None:
            self._state = "only text"
        if call is not None:
            return call
        return raw if self.syntax == "llama" or (self.syntax == "mistral" and self.num_calls) else self._marker + raw


def _as_call(raw: str) -> ToolCall | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return ToolCall(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


class _JsonEnd:
    """Finds where the first JSON value of a growing text ends, looking at each character once."""

    def __init__(self) -> None:
        self.position = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The index behind the value, or None while it is incomplete. A text that begins otherwise ends with its first character."""
        while self.position < len(text):
            character = text[self.position]
            self.position += 1
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
            if self._depth <= 0 and not self._in_string:
                return self.position
        return None


def _overlap(text: str, marker: str) -> int:
    """How many of the text's last characters could be the beginning of the marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)
