"""What becomes of each HTTP request: one `RequestRecord`, filled in on its way and told to whoever listens when it is over.

The log line, the counters in /metrics and the span of a trace are three views of this one record, so they can't disagree. `Recorder`
is the outermost layer of the server: it also gives each request its id, and is the last resort for errors, so that these carry it too.

The record of the request at hand can be had anywhere below (`current_record`), through a context variable: a log line
written in the depth of a request is to name it, without an argument through every call on the way.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minfer.engine.outputs import RequestMetrics
from minfer.server.connection import CLIENT_CLOSED_REQUEST
from minfer.server.errors import as_api_error

logger = logging.getLogger("minfer.server")

# Ids end up in logs and headers: short, printable, no spaces.
_SAFE_ID = re.compile(r"[!-~]{1,128}")
TRACE_HEADERS = ("traceparent", "tracestate")
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
ELSEWHERE = "other"  # a path that is no route, a method that nobody knows: they must not fill the memory


@dataclass
class GenerationRecord:
    """The part of it that the engine did. Times are seconds of `time.monotonic()`."""

    id: str  # what the answer calls itself: chatcmpl-...
    settings: dict[str, Any]  # of sampling: max_tokens, temperature, ...
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ending: str = "aborted: the client left"  # until it is known better; "done", or what went wrong
    finish_reasons: list[str] = field(default_factory=list)
    metrics: RequestMetrics | None = None  # of the first prompt


@dataclass
class RequestRecord:
    """One HTTP request. `status` is 0 until an answer has begun; `route` is the route's own path, `ELSEWHERE` for none."""

    id: str
    method: str
    path: str  # as it was sent, percent-encoded and so free of control characters; without the query, which may hold secrets
    trace_headers: dict[str, str] = field(default_factory=dict)  # W3C trace context: the span of the caller
    started: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)  # the same moment on the clock of the wall
    ended: float = 0.0
    route: str = ELSEWHERE
    status: int = 0
    key: str | None = None  # the API key's name, where there are keys
    generation: GenerationRecord | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def facts(self) -> dict[str, Any]:
        """What is known, flat, for a log; unknown things are left out."""
        values: dict[str, Any] = {"method": self.method, "path": self.path, "status": self.status, "seconds": round(self.seconds, 4)}
        if self.key is not None:
            values["key"] = self.key
        did = self.generation
        if did is not None:
            values |= {"answer_id": did.id, "ending": did.ending, "prompt_tokens": did.prompt_tokens}
            values |= {"cached_tokens": did.cached_tokens, "output_tokens": did.output_tokens}
            if did.metrics is not None and did.metrics.queue_s is not None:
                values["queue_seconds"] = round(did.metrics.queue_s, 4)
            if did.metrics is not None and did.metrics.first_token_time is not None:
                values["first_token_seconds"] = round(did.metrics.first_token_time - self.started, 4)
        return values


Listener = Callable[[RequestRecord], None]
_current: ContextVar[RequestRecord | None] = ContextVar("minfer_request", default=None)


def current_record() -> RequestRecord | None:
    """That of the request in whose course this is called; None outside of any."""
    return _current.get()


class Recorder:
    """Echoes `x-request-id`, or makes one up; tells `listeners` of each request that is over, however it ended."""

    def __init__(self, app: ASGIApp, listeners: Sequence[Listener]) -> None:
        self.app = app
        self.listeners = listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _SAFE_ID.fullmatch(given) else uuid.uuid4().hex
        method = scope["method"] if scope["method"] in METHODS else ELSEWHERE
        path = scope["raw_path"].decode("ascii", "backslashreplace")[:500]
        record = RequestRecord(request_id, method, path, {name: headers[name] for name in TRACE_HEADERS if name in headers})
        state = scope.setdefault("state", {})
        state["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        before = _current.set(record)
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            answer = as_api_error(error).response()
            if not record.status:
                await answer(scope, receive, send_with_id)
        finally:
            record.ended, record.status = time.monotonic(), record.status or CLIENT_CLOSED_REQUEST
            record.route, record.key = _route(scope), state.get("key")
            self._tell(record)
            _current.reset(before)

    def _tell(self, record: RequestRecord) -> None:
        for listener in self.listeners:
            try:
                listener(record)
            except Exception:  # whoever listens must not harm what it listens to
                logger.exception("a record could not be told to %r", listener)


def _route(scope: Scope) -> str:
    """The path of the route that was taken, or, for what was refused before, that would have been."""
    taken = scope.get("route")
    if taken is not None:
        return str(taken.path)
    paths = {getattr(route, "path", None) for route in scope["app"].routes} if "app" in scope else set()
    return str(scope["path"]) if scope["path"] in paths else ELSEWHERE
