"""What every request passes on its way in: an id, the API key, and a limit on the body.

Plain ASGI classes. Starlette's convenience class puts a queue between the route and the socket, which costs time for each
streamed token and hides a client that leaves.
"""

from __future__ import annotations

import hmac
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minfer.server.errors import ApiError, as_api_error

# Ids end up in logs and headers: short, printable, no spaces.
_SAFE_ID = re.compile(r"[!-~]{1,128}")
PUBLIC_PATHS = frozenset({"/health", "/ping"})


class RequestId:
    """Echoes `x-request-id`, or makes one up; and is the last resort for errors, so that these carry it too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            answer = as_api_error(error).response()
            if not started:
                await answer(scope, receive, send_with_id)


class ApiKey:
    """`Authorization: Bearer KEY` on every path but /health, compared in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            # compare_digest takes text only if it is ASCII, so bytes.
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key):
                message = "missing or wrong API key; send it as the header Authorization: Bearer KEY"
                error = ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """413 for a body over the limit: at once where its length is declared, else when that much has come."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self.limit:
            await self._error().response()(scope, receive, send)
            return
        received = 0

        async def counting() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise self._error()
            return message

        await self.app(scope, counting, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"the request body is larger than {self.limit} bytes", code="request_too_large")
