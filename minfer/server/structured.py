"""The many spellings of "answer in this form" -> one `StructuredOutputsParams`.

OpenAI's `response_format`; vLLM's `structured_outputs` and its older `guided_json`, `guided_regex`, `guided_choice`, `guided_grammar`;
llama.cpp's `json_schema` and `grammar`. A request may use one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minfer.errors import RequestError
from minfer.structured_outputs import StructuredOutputsParams

# Request field -> the form's field.
_DIRECT = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "json",
    "grammar": "grammar",
}
STRUCTURED_FIELDS = ("response_format", "structured_outputs", *_DIRECT)


def structured_outputs(fields: Mapping[str, Any]) -> tuple[StructuredOutputsParams | None, str | None]:
    """The form that a request asks for, and the field that asks. Raises RequestError that names the field."""
    asked = [name for name in STRUCTURED_FIELDS if fields.get(name) not in (None, "", {"type": "text"})]
    if not asked:
        return None, None
    if len(asked) > 1:
        raise RequestError(f"{' and '.join(asked)} both ask for a form of the output; give one of them", param=asked[1])
    (name,) = asked
    try:
        return _form(name, fields[name]), name
    except RequestError as error:
        raise in_field(error, name) from error


def in_field(error: RequestError, name: str) -> RequestError:
    """The same error about the field that the client sent."""
    return RequestError(str(error).replace("structured_outputs:", f"{name}:", 1), param=name, code=error.code)


def _form(name: str, value: Any) -> StructuredOutputsParams:
    if name == "response_format":
        return _response_format(value)
    if name == "structured_outputs":
        if not isinstance(value, Mapping):
            raise RequestError("structured_outputs must be an object", param=name)
        return StructuredOutputsParams.from_mapping(value)
    return StructuredOutputsParams(**{_DIRECT[name]: value})


def _response_format(value: Any) -> StructuredOutputsParams:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind != "json_schema":
        raise RequestError("response_format must be an object whose type is text, json_object or json_schema", param="response_format")
    wrapper = value.get("json_schema")
    if not isinstance(wrapper, Mapping) or not isinstance(wrapper.get("schema"), Mapping):
        raise RequestError("response_format.json_schema must be an object that holds the schema as an object", param="response_format")
    return StructuredOutputsParams(json=wrapper["schema"])
