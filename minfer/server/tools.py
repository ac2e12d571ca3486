"""The tools of a chat request: checked, told to the model, and, where a call is demanded, enforced by a grammar.

A template that reads `tools` is given them, and the model writes calls in its own way (tool_calls.py). For a template that doesn't, the
tools are described in the system message, in Hermes' format: a model that was never trained on tools may still answer well, and one that
must call (`tool_choice` "required", or a name) can't answer otherwise, since the grammar allows nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minfer.errors import RequestError
from minfer.guided.grammars import WHITESPACE
from minfer.server.tool_calls import HERMES_END, MARKERS, ToolSyntax, detect_syntax
from minfer.structured_outputs import StructuredOutputsParams
from minfer.tokenizer import Tokenizer

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tools:
    """What a request may call. `demanded`: those of which one must be called; empty where the model is free."""

    tools: tuple[Mapping[str, Any], ...]
    syntax: ToolSyntax
    in_template: bool
    demanded: tuple[Mapping[str, Any], ...] = ()
    parallel: bool = True

    def messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation with the tools described in its system message, for a template that knows none."""
        if self.in_template:
            return messages
        about = _PROMPT.format(tools="\n".join(json.dumps(tool) for tool in self.tools))
        if messages and messages[0].get("role") == "system" and isinstance(messages[0].get("content"), str):
            return [{**messages[0], "content": f"{messages[0]['content']}\n\n{about}"}, *messages[1:]]
        return [{"role": "system", "content": about}, *messages]

    def grammar(self, tokenizer: Tokenizer) -> StructuredOutputsParams | None:
        """One of the demanded calls, or several, as the model writes them."""
        if not self.demanded:
            return None
        key = "parameters" if self.syntax == "llama" else "arguments"
        calls = " | ".join(f"%json {json.dumps(_call_schema(tool['function'], key))}" for tool in self.demanded)
        marker = _literal(tokenizer, MARKERS[self.syntax])
        more = {"hermes": r'("\n" one)*', "mistral": '(", " call)*', "llama": '("; " call)*'}[self.syntax] if self.parallel else ""
        start = {
            "hermes": f"start: one {more}\none: {marker} " + r'"\n" call "\n" ' + _literal(tokenizer, HERMES_END),
            "mistral": f'start: {marker} " "? "[" call {more} "]"',
            "llama": f"start: call {more}",
        }[self.syntax]
        return StructuredOutputsParams(grammar=f"{start}\ncall: {calls}\n")


def read_tools(tools: Sequence[Any] | None, choice: Any, parallel: bool | None, tokenizer: Tokenizer | None) -> Tools | None:
    """None where the request has no tools, or wants none called. Raises RequestError that names the field."""
    checked = tuple(_checked(tool, f"tools[{index}]") for index, tool in enumerate(tools or ()))
    if len(checked) > MAX_TOOLS:
        raise RequestError(f"tools holds {len(checked)} tools, and the limit is {MAX_TOOLS}", param="tools")
    names = [tool["function"]["name"] for tool in checked]
    if len(set(names)) < len(names):
        raise RequestError("tools holds two tools of the same name", param="tools")
    demanded = _demanded(choice, checked)
    if not checked or choice == "none":
        return None
    template = tokenizer.tool_template if tokenizer is not None else None
    return Tools(checked, detect_syntax(template), template is not None, demanded, parallel is not False)


def _checked(tool: Any, where: str) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        raise RequestError(f"{where} must be an object with the type function and a function", param="tools")
    if not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
        raise RequestError(f"{where}.function.name must be 1 to 64 letters, digits, dots, dashes or underscores", param="tools")
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise RequestError(f"{where}.function.parameters must be a JSON schema as an object", param="tools")
    return dict(tool)


def _demanded(choice: Any, tools: tuple[Mapping[str, Any], ...]) -> tuple[Mapping[str, Any], ...]:
    if choice in (None, "none", "auto"):
        return ()
    if choice == "required":
        if not tools:
            raise RequestError("tool_choice is required, and there are no tools", param="tool_choice")
        return tools
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        raise RequestError("tool_choice must be none, auto, required, or name a function", param="tool_choice")
    named = tuple(tool for tool in tools if tool["function"]["name"] == name)
    if not named:
        raise RequestError(f"tool_choice names {str(name)[:64]!r}, which is not among the tools", param="tool_choice")
    return named


def _call_schema(function: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A call of this function. References inside its parameters are moved along with them."""
    parameters = _moved(function.get("parameters") or {"type": "object"}, f"#/properties/{key}")
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, key: parameters},
        "required": ["name", key],
        "additionalProperties": False,
        "x-guidance": {"whitespace_pattern": WHITESPACE},
    }


def _moved(schema: Any, place: str) -> Any:
    """The schema with its local references pointing to where it will stand."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved


def _literal(tokenizer: Tokenizer, marker: str) -> str:
    """The marker in Lark: by id where it is a special token, since special tokens are no text to a grammar."""
    ids = tokenizer.encode(marker, add_special_tokens=False)
    return f"<[{ids[0]}]>" if len(ids) == 1 and tokenizer.is_special(ids[0]) else json.dumps(marker)


def without_calls(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The conversation with its earlier calls and their results as text, for a template that knows no tools."""
    return messages if tokenizer.tool_template is not None else [_as_text(message) for message in messages]


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.get('content')}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not calls:
        return message
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    texts = [
        f'{MARKERS["hermes"]}\n{{"name": {json.dumps(f.get("name"))}, "arguments": {f.get("arguments")}}}\n{HERMES_END}'
        for f in functions
        if isinstance(f, dict)
    ]
    return {"role": message.get("role"), "content": "\n".join([*filter(None, [message.get("content")]), *texts])}


_PROMPT = """You may call functions to help with the user's request. These are their signatures:
<tools>
{tools}
</tools>
For a function call, answer with its name and its arguments as a JSON object:
<tool_call>
{{"name": <function name>, "arguments": <arguments as a JSON object>}}
</tool_call>"""
