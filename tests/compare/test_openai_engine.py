"""The client for any server: streamed tokens counted right from lenient and strict servers, refusals passed on as reasons."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from compare.engines.base import Recorder
from compare.engines.openai import OpenAI
from compare.protocol import LoadOptions, Request


@contextmanager
def server(strict: bool) -> Iterator[str]:
    """Lenient: two tokens a chunk, counted by usage. Strict: refuses unknown options, one token a chunk."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, json.dumps({"data": [{"id": "m"}]}))

        def do_POST(self) -> None:
            body: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if (strict and "continuous_usage_stats" in body["stream_options"]) or body["max_tokens"] == 13:
                self._send(400, '{"error": {"message": "no such option"}}')
                return
            step = 1 if strict else 2
            events: list[dict[str, Any]] = []
            for made in range(step, body["max_tokens"] + 1, step):
                events.append({"choices": [{"text": "x"}], **({} if strict else {"usage": {"completion_tokens": made}})})
            events.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
            self._send(200, "".join(f"data: {json.dumps(e)}\n\n" for e in events) + ": a comment\n\ndata: [DONE]\n\n")

        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            return

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        http.shutdown()
        http.server_close()


def loaded(url: str) -> OpenAI:
    engine = OpenAI()
    engine.load(Path(), LoadOptions("-", "cpu", 1, 64, 4, argument=url))
    return engine


@pytest.mark.parametrize("strict", [False, True])
def test_every_token_is_counted_once(strict: bool) -> None:
    with server(strict) as url:
        recorder = Recorder([Request([300, 301], 8), Request([300], 4, arrival=0.05)])
        loaded(url).generate(recorder)
    assert [len(t.times) for t in recorder.traces] == [8, 4]
    assert recorder.traces[1].times[0] > 0.05


def test_a_refusal_becomes_the_reason() -> None:
    with server(strict=True) as url, pytest.raises(RuntimeError, match=r"HTTP 400: .*no such option"):
        loaded(url).generate(Recorder([Request([300], 13)]))


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="not an http address"):
        loaded("localhost:1")
