"""Errors as OpenAI's clients expect them: `{"error": {"message", "type", "param", "code"}}`, for every status and every route.

Clients retry 429 and 5xx by themselves, so what can't succeed on a second try must be a 4xx. A body in any other shape
shows up in them as "400 (no body)".
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response

from minfer.errors import CapacityError, EngineDeadError, MinferError, RequestError

logger = logging.getLogger("minfer.server")

_TYPES = {401: "authentication_error", 429: "overloaded_error"}
_PLAIN = {  # what the routing raises by itself: (code, message)
    404: (
        "route_not_found",
        "there is no {method} {path}; GET /openapi.json lists what there is",
    ),
    405: ("method_not_allowed", "{path} does not take {method}"),
}


class ApiError(HTTPException):
    """An answer other than 2xx. An HTTPException, because FastAPI passes only those on from reading a body."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.message = message
        self.param = param
        self.code = code

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        # ASCII: a message may quote a lone surrogate, which UTF-8 can't carry.
        return Response(json.dumps(self.body), self.status_code, dict(self.headers or {}), "application/json")


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception. One that minfer can't explain is logged, and not told to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, CapacityError):
        return ApiError(429, str(error), code="overloaded", headers={"retry-after": "1"})
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, MinferError):
        return ApiError(500, str(error))
    logger.error("a request failed on an error that is a bug in minfer", exc_info=error)
    return ApiError(500, "the server failed on this request; its log has the details", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    # Starlette types a handler's argument as Exception, whatever class it is registered for.
    async def on_minfer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException), "registered for it alone"
        if isinstance(error, ApiError):
            return error.response()
        code, message = _PLAIN.get(error.status_code, (None, str(error.detail)))
        text = message.format(method=request.method, path=_shown(request.url.path))
        return ApiError(error.status_code, text, code=code, headers=error.headers).response()

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError), "registered for it alone"
        return _explain(error, request.headers.get("content-type", "")).response()

    app.add_exception_handler(MinferError, on_minfer)
    app.add_exception_handler(StarletteHTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_invalid)


def _explain(error: RequestValidationError, content_type: str) -> ApiError:
    """One sentence about the first field that is wrong. A union's alternatives are told together."""
    problems = error.errors()
    first = problems[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if len(first["loc"]) < 2:
        if first["type"] != "missing" and "json" not in content_type.lower():
            return ApiError(415, f"send the body as content-type: application/json, not {_shown(content_type) or 'without one'}")
        return ApiError(400, "the body must be a JSON object")
    field = str(first["loc"][1])
    if first["type"] == "missing" and len(first["loc"]) == 2:
        return ApiError(400, f"{field} is missing", param=field, code="missing_required_parameter")
    same = [problem["msg"] for problem in problems if problem["loc"][1:2] == first["loc"][1:2]]
    reasons = list(dict.fromkeys(message[:1].lower() + message[1:] for message in same))[:4]
    return ApiError(400, f"{_shown(field)}: {', or '.join(reasons)}", param=field)


def _shown(text: str) -> str:
    """A caller's text as it may stand in a message: short."""
    return text if len(text) <= 100 else text[:97] + "..."
