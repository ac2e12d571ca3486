"""What stands between a socket and a route, in the order in which a request meets it:

Recorder       an id; the record of what becomes of it; errors that nobody else explains
HeaderLimit    431
CORS           only with --cors-origin; around all that may refuse, so that a page can read why
BrowserGuard   Host and Origin
ApiKey         401; only where there are keys
Gate           429: the rate of the key, and the queue
BodyLimit      413, 408
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from minfer.server.admission import Admission, Gate
from minfer.server.keys import ApiKeys
from minfer.server.middleware import ApiKey, BodyLimit, HeaderLimit
from minfer.server.options import ServerOptions
from minfer.server.origins import BrowserGuard
from minfer.server.records import Listener, Recorder
from minfer.server.slot import ModelSlot


def add_front(
    app: FastAPI, slot: ModelSlot, options: ServerOptions, keys: ApiKeys, admission: Admission, listeners: Sequence[Listener]
) -> None:
    """Puts all of them around the routes. `listeners` are told of each request that is over."""
    # Each wraps what was added before it, so the innermost comes first.
    app.add_middleware(BodyLimit, limit=options.max_body_bytes, seconds=options.read_seconds)
    app.add_middleware(Gate, admission=admission, slot=slot)
    if keys:
        app.add_middleware(ApiKey, keys=keys)
    app.add_middleware(BrowserGuard, options=options)
    if options.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(HeaderLimit)
    app.add_middleware(Recorder, listeners=listeners)
