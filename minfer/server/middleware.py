"""What every request passes on its way in: the API key, and limits on its headers and its body.

Plain ASGI classes. Starlette's convenience class puts a queue between the route and the socket, which costs time for each
streamed token and hides a client that leaves.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minfer.server.errors import ApiError
from minfer.server.keys import ApiKeys
from minfer.server.page import PAGE_PATHS

PUBLIC_PATHS = frozenset({"/health", "/ping"}) | PAGE_PATHS
# A browser sends about 20 headers of 2 KiB in all, an SDK fewer.
MAX_HEADERS = 100
MAX_HEADER_BYTES = 32768


class ApiKey:
    """`Authorization: Bearer KEY` on every path but the public ones. Leaves the key's name in the request's state."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            name = self.keys.name_of(given.strip()) if scheme.lower() == "bearer" else None
            if name is None:
                message = "missing or wrong API key; send it as the header Authorization: Bearer KEY"
                error = ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
                await error.response()(scope, receive, send)
                return
            scope.setdefault("state", {})["key"] = name
        await self.app(scope, receive, send)


class HeaderLimit:
    """431 for more headers, or larger ones, than any client has a use for."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            size = len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers)
            if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
                message = (
                    f"a request may have {MAX_HEADERS} headers and {MAX_HEADER_BYTES} bytes of them; this one has {len(headers)} and {size}"
                )
                await ApiError(431, message, code="headers_too_large").response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """413 for a body over the limit, at once where its length is declared, else when that much has come; 408 for one that is sent
    so slowly that it isn't there after `seconds`."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float) -> None:
        self.app = app
        self.limit = limit
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self.limit:
            await self._error().response()(scope, receive, send)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def counting() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is only the news that the client has left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
            except asyncio.TimeoutError as error:
                message_text = f"the request body was not there after {self.seconds:g} s"
                raise ApiError(408, message_text, code="request_timeout", headers={"connection": "close"}) from error
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self.limit:
                raise self._error()
            return message

        await self.app(scope, counting, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"the request body is larger than {self.limit} bytes", code="request_too_large")
