"""The OpenAPI document, made true: what FastAPI can't know about answers.

FastAPI says that a body which doesn't fit is answered with 422 in a shape of its own; here it is a 400 with OpenAI's error body, as are
all other refusals. It also can't see that two routes answer with a stream when they are asked to, or that keys are wanted.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

ERROR = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "authentication_error", "overloaded_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_BODY = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_RETRY = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds after which to try again."}}
POSTED = {
    "400": "The request can't be served as it is; `param` names the field.",
    "404": "Another model was asked for.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "No room in the queue, or the key has sent too much.",
}
ALWAYS = {"403": "A script of a page that wasn't allowed.", "431": "Too many or too large headers.", "500": "A bug in minfer."}
NEEDS_MODEL = {"503": "The model is being loaded, or the engine has died."}
STREAMS = ("/v1/chat/completions", "/v1/completions")
NEVER_FAIL, OPEN = ("/version", "/metrics"), ("/health", "/ping")


class Application(FastAPI):
    """A FastAPI whose document says what the server does. `with_keys`: whether API keys are wanted."""

    def __init__(self, *, with_keys: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.with_keys = with_keys

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()  # kept by FastAPI, so this mends it once, and then again without effect
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for theirs in ("HTTPValidationError", "ValidationError"):
            schemas.pop(theirs, None)
        schemas["Error"] = ERROR
        if self.with_keys:
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                self._mend(path, method, operation)
        return document

    def _mend(self, path: str, method: str, operation: dict[str, Any]) -> None:
        answers = operation["responses"]
        answers.pop("422", None)
        told = {**ALWAYS, **(POSTED if method == "post" else {}), **({} if path in NEVER_FAIL else NEEDS_MODEL)}
        if "{" in path:
            told["404"] = POSTED["404"]
        if self.with_keys and path not in OPEN:
            told["401"] = "No API key, or a wrong one."
            operation["security"] = [{"key": []}]
        for status, why in sorted(told.items()):
            answers[status] = {"description": why, "content": _BODY, **({"headers": _RETRY} if status in ("429", "503") else {})}
        if path in STREAMS:
            answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
            answers["200"]["description"] = "The whole answer, or with `stream` its events."
