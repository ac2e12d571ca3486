"""The page's files, read once and served from memory, without a key: the page itself is what asks for one.

The policy (Content-Security-Policy) is the second lock behind escaping. Scripts and styles are these files and nothing else, inline ones
don't run, requests go to this server alone, and a string can't become markup anywhere: `require-trusted-types-for 'script'` makes
`innerHTML` and its kin throw, so the page builds every element by hand and puts text in as text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI, Request
from starlette.responses import Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".md": "text/markdown; charset=utf-8",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # ask each time; unchanged files cost a 304
}
_FOLDER = resources.files(__package__) / "static"


@dataclass(frozen=True)
class Asset:
    content: bytes
    type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.content).hexdigest()[:24]}"'


def _path_of(name: str) -> str:
    return "/" if name == "index.html" else f"/static/{name}"


# Public: no path but these is served without a key.
PAGE_PATHS = frozenset(_path_of(file.name) for file in _FOLDER.iterdir())


def add_page(app: FastAPI) -> None:
    """Routes for each file; not part of the API's description."""
    for file in _FOLDER.iterdir():
        suffix = "." + file.name.rpartition(".")[2]
        asset = Asset(file.read_bytes(), _TYPES[suffix])
        app.add_api_route(_path_of(file.name), _answer(asset), methods=["GET", "HEAD"], include_in_schema=False)


def _answer(asset: Asset) -> Callable[[Request], Awaitable[Response]]:
    etag = asset.etag

    async def answer(request: Request) -> Response:
        headers = {**HEADERS, "etag": etag}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(asset.content, headers=headers, media_type=asset.type)

    return answer
