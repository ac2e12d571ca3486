"""Any server that speaks the OpenAI completions API, by URL: `--against openai=http://127.0.0.1:8000/v1`.

Ollama, TGI, OpenLLM, LightLLM, LMDeploy, llama.cpp's server, vLLM, minfer's own. Timed from the client's side, streaming: a
token's time is that of the event that brought it. Prompts are sent as token ids; servers that refuse them say so in the cell.
Servers stream text, so which ids came back is unknown and greedy agreement can't be judged. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.parse
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Recorder
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="openai",
    title="a server with the OpenAI API",
    url="https://platform.openai.com/docs/api-reference/completions",
    setting="whatever the server was started with; streaming client in this machine",
    precisions={"cpu": ("-",), "cuda": ("-",)},
    batching="continuous",
    ids=False,
    modules=("http.client",),
    adapter="OpenAI",
)

TIMEOUT = 600.0
LOWEST_SAFE_ID = 256  # an ordinary token in every vocabulary in use


class OpenAI(Adapter):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        self.url = urllib.parse.urlsplit(options.argument.rstrip("/"))
        if self.url.scheme not in ("http", "https"):
            raise ValueError(f"{options.argument!r} is not an http address")
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            self.headers["Authorization"] = f"Bearer {key}"
        connection = self._connect()
        connection.request("GET", f"{self.url.path}/models", headers=self.headers)
        models = json.loads(self._checked(connection.getresponse()).read())
        self.model: str = models["data"][0]["id"]
        self.stream_options = self._accepted_stream_options()
        return {"version": f"{self.model} at {self.url.netloc}", "flags": f"{self.stream_options}", "weight_bytes": 0}

    def _accepted_stream_options(self) -> dict[str, bool]:
        """Asks once, outside any clock, whether the server can report its token count in every chunk; strict ones refuse to."""
        every = {"include_usage": True, "continuous_usage_stats": True}
        probe = Request([LOWEST_SAFE_ID], 1)
        try:
            self.stream_options = every
            self._stream(Recorder([probe]), 0, probe)
        except RuntimeError:
            return {"include_usage": True}
        return every

    def generate(self, recorder: Recorder) -> None:
        errors: list[Exception] = []

        def run(index: int, request: Request) -> None:
            try:
                self._stream(recorder, index, request)
            except Exception as error:  # carried over to the caller's thread, where it becomes the cell's reason
                errors.append(error)

        threads = [threading.Thread(target=run, args=(i, r)) for i, r in enumerate(recorder.requests)]
        for index in sorted(range(len(threads)), key=lambda i: recorder.requests[i].arrival):
            recorder.wait_until(recorder.requests[index].arrival)
            threads[index].start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _stream(self, recorder: Recorder, index: int, request: Request) -> None:
        """One streamed completion. A chunk with text counts as one token unless the server reports how many it made so far."""
        body = {
            "model": self.model,
            "prompt": request.token_ids,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": request.ignore_eos,
            "stream": True,
            "stream_options": self.stream_options,
        }
        connection = self._connect()
        connection.request("POST", f"{self.url.path}/completions", json.dumps(body), self.headers)
        seen, chunks = 0, 0
        for raw in self._checked(connection.getresponse()):
            line = raw.strip()
            if not line.startswith(b"data:") or line == b"data: [DONE]":
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(f"the server ended the stream: {event['error']}")
            chunks += bool(event.get("choices"))
            made = (event.get("usage") or {}).get("completion_tokens", chunks)
            recorder.tokens(index, [0] * min(made - seen, request.max_tokens - seen))
            seen = max(seen, made)

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.url.scheme == "https" else http.client.HTTPConnection
        return kind(self.url.netloc, timeout=TIMEOUT)

    @staticmethod
    def _checked(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {response.read(400).decode(errors='replace')}")
        return response
