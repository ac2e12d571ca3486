"""The server's log: a line for each request and for each thing that happens in its course, all with the request's id.

    text   2026-11-21 17:30:45,123 INFO minfer.server [3f2a...] POST /v1/completions 200 in 0.512 s: done, 12+40 tokens, ...
    json   {"time": "2026-11-21T17:30:45.123Z", "level": "INFO", "logger": "minfer.server", "request_id": "3f2a...", "status": 200, ...}

The second is for programs that collect logs. Where lines go and which of them is the business of whoever set up logging (`-v` of the
command line shows requests); `log_format` changes the form of what is written there, for as long as the server runs. What a client sent
can't break out of its line: JSON escapes it, and in text only ids and paths appear, which are checked or percent-encoded.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minfer.server.options import LogFormat
from minfer.server.records import RequestRecord, current_record

logger = logging.getLogger("minfer.server")

PROBES = frozenset({"/health", "/ping", "/metrics", "/v1/engine/state"})  # asked every few seconds, so only -vv shows them


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request = current_record()
        record.request = "" if request is None else f" [{request.id}]"
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One object a line, ASCII. `extra={"facts": {...}}` adds fields of its own to a line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname, "logger": record.name}
        request = current_record()
        if request is not None:
            line["request_id"] = request.id
        line["message"] = record.getMessage()
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_request(record: RequestRecord) -> None:
    """The line of a request that is over."""
    level = logging.DEBUG if record.route in PROBES and record.status < 500 else logging.INFO
    if not logger.isEnabledFor(level):
        return
    facts = record.facts()
    text = f"{record.method} {record.path} {record.status} in {record.seconds:.3f} s"
    if record.generation is not None:
        text += f": {record.generation.ending!r}, {facts['prompt_tokens']}+{facts['output_tokens']} tokens, {facts['answer_id']}"
    logger.log(level, "%s", text, extra={"facts": facts})


@contextmanager
def log_format(form: LogFormat) -> Iterator[None]:
    """Every handler that minfer's log reaches writes in this form."""
    formatter = JsonFormatter() if form == "json" else TextFormatter("%(asctime)s %(levelname)s %(name)s%(request)s %(message)s")
    handlers = [*logging.getLogger("minfer").handlers, *logging.getLogger().handlers]
    before = [handler.formatter for handler in handlers]
    for handler in handlers:
        handler.setFormatter(formatter)
    try:
        yield
    finally:
        for handler, own in zip(handlers, before, strict=True):
            handler.setFormatter(own)
