"""Browsers. A page of any site may send requests to this machine from its visitor's browser, and so may a name that an attacker
points at 127.0.0.1 (DNS rebinding, CVE-2024-28224). Neither is wanted unless it was asked for.

- `Host`: a server that only this machine can reach answers to this machine's names. One that is open to a network can't know its
  names, so there the check is `--allowed-host`'s alone.
- `Origin`: browsers send it with what a script does. It must be the server itself, or one of `--cors-origin`. Programs that
  aren't browsers send none, and aren't asked.
- CORS headers are sent to the origins of `--cors-origin` and to nobody else; none by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from minfer.server.errors import ApiError
from minfer.server.options import ServerOptions

LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class BrowserGuard:
    """400 for a Host that isn't ours, 403 for an Origin that wasn't allowed."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self.app = app
        self.origins = frozenset(origin.lower() for origin in options.cors_origin)
        self.hosts = allowed_hosts(options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._problem(Headers(scope=scope))
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _problem(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            message = f"this server does not answer to the host name {_shown(host)}; start it with --allowed-host to add a name"
            return ApiError(400, message, code="unknown_host")
        origin = headers.get("origin")
        if origin is None or "*" in self.origins or origin.lower() in self.origins or _is_own(origin, host):
            return None
        message = f"scripts of {_shown(origin)} may not use this server; start it with --cors-origin {_shown(origin)} to allow them"
        return ApiError(403, message, code="origin_not_allowed")


def allowed_hosts(options: ServerOptions) -> frozenset[str] | None:
    """The names that the Host header may hold, None for any."""
    given = _lower(options.allowed_host)
    if "*" in given or (not given and not options.is_private):
        return None
    return given | LOCAL_NAMES | {options.host.lower()}


def host_name(host: str) -> str:
    """`Example.org:8000` -> `example.org`, `[::1]:80` -> `::1`."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_own(origin: str, host: str) -> bool:
    """Whether the page came from this server: the browser's own rule, except that http and https count as one behind a proxy."""
    try:
        return bool(host) and urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _lower(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.lower() for name in names)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:97] + "...")
