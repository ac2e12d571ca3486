"""Server-sent events: `data: JSON`, a blank line after each, `data: [DONE]` at the end.

Headers leave with the first event, so that whatever goes wrong before the first token (queue, validation, a dead engine) is
still an HTTP status. If that takes longer than `ping_seconds`, they leave with a comment (a line that starts with a colon,
which clients skip), and comments follow in every such silence: proxies close connections on which nothing happens. After
that, an error is an event, `data: {"error": ...}`, and the end of the stream; never a bare cut.

A client that doesn't read is waited for as long as `read_seconds`: what it was to get lies in memory meanwhile, at most what
its request may generate.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minfer.server.connection import cancel, wait_for_disconnect
from minfer.server.errors import as_api_error
from minfer.server.options import ServerOptions

logger = logging.getLogger("minfer.server")

Events = AsyncGenerator[bytes, None]

_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make one for each event
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second one is nginx's switch


def event(payload: dict[str, Any]) -> bytes:
    # ASCII escapes keep any text, also lone surrogates and line separators, inside its line.
    return b"data: " + _encode(payload).encode() + b"\n\n"


async def open_stream(events: Events, options: ServerOptions) -> Response:
    """A response that sends `events`, once there is a first one or `ping_seconds` have passed. Raises what the first one raises."""
    first = asyncio.create_task(_next(events))
    try:
        await asyncio.wait({first}, timeout=options.ping_seconds)
        if first.done():
            first.result()
    except BaseException:  # also a cancellation: nobody else will close the generator
        await cancel(first)
        await events.aclose()
        raise
    return _EventStream(first, events, options)


async def _next(events: Events) -> bytes:
    return await anext(events, b"")


class _EventStream(Response):
    media_type = "text/event-stream"

    def __init__(self, first: asyncio.Task[bytes], events: Events, options: ServerOptions) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self.first = first
        self.events = events
        self.ping_seconds = options.ping_seconds
        self.read_seconds = options.read_seconds
        self.silent = True
        self.blocked_since: float | None = None  # when a send began that the client's full buffers hold up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        parts = (self._write(send), wait_for_disconnect(receive), self._watch_reader(), self._ping(send))
        tasks = [asyncio.create_task(part) for part in parts]
        try:
            await asyncio.wait(tasks[:3], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(self.first, *tasks)
            await self.events.aclose()
        if not tasks[0].cancelled():
            tasks[0].result()

    async def _write(self, send: Send) -> None:
        try:
            await self._send(send, await self.first)
            async for item in self.events:
                await self._send(send, item)
        except Exception as error:
            await self._send(send, event(as_api_error(error).body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, item: bytes) -> None:
        self.silent = False
        self.blocked_since = self.blocked_since or time.monotonic()
        await send({"type": "http.response.body", "body": item, "more_body": True})
        self.blocked_since = None

    async def _watch_reader(self) -> None:
        """Returns, and so ends the stream, when the client has not read anything for `read_seconds`."""
        while self.blocked_since is None or time.monotonic() - self.blocked_since < self.read_seconds:
            await asyncio.sleep(self.read_seconds / 4)
        logger.info("a stream was ended: its client has not read for %g s", self.read_seconds)

    async def _ping(self, send: Send) -> None:
        if not self.first.done():  # the wait for it is what has just passed
            await self._send(send, PING)
        while True:
            self.silent = True
            await asyncio.sleep(self.ping_seconds)
            if self.silent:
                await self._send(send, PING)
