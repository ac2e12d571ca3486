"""The process in which chat templates run: jinja2's immutable sandbox, and nothing of minfer.

A chat template is a program out of a downloaded file. The sandbox keeps it from Python's internals, but not from looping for
ever or from building a string of many gigabytes, and inside a thread neither can be stopped. So it runs in a small process of
its own that has a memory limit and that the parent kills when it takes too long (`minfer/tokenizer/chat.py`). It is started
once and serves every later message, which costs a fraction of a millisecond each.

The protocol is one JSON object a line. First line in: `{"path": [...], "memory": bytes, "seconds": int}`. Then, for each request,
`{"template": str, "variables": {...}, "options": {...}, "limit": characters}`, answered by `{"text": str}` or by
`{"error": str, "kind": "template" | "options" | "limit"}`; "template" carries the message of the template's own
`raise_exception`, or of jinja2. `options` are the variables that the caller chose by name; one that the template never reads is an error.

The environment is the one that transformers gives templates: trimmed blocks, `{% break %}`, `{% generation %}`, `tojson` without
HTML escapes, `raise_exception`, `strftime_now`. This file is run as a script and imports only the standard library and jinja2.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO


def build_environment() -> Any:
    """The jinja2 environment of chat templates; imported here, after `sys.path` is the parent's."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks what a trainer would learn from; here it is just its body."""

        tags = {"generation"}  # noqa: RUF012  (jinja2 reads it from the class, as an ordinary set)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def render(compile_template: Callable[[str], tuple[Any, frozenset[str]]], request: dict[str, Any]) -> dict[str, str]:
    """Answer one request; every failure is an answer too, so that the process outlives a bad template."""
    from jinja2 import TemplateError

    try:
        template, names = compile_template(request["template"])
        unread = sorted(set(request["options"]) - names)
        if unread:
            return {"error": ", ".join(unread), "kind": "options"}
        pieces: list[str] = []
        size = 0
        for piece in template.generate(**request["variables"], **request["options"]):
            size += len(piece)
            if size > request["limit"]:
                return {"error": f"its text is longer than {request['limit']} characters", "kind": "limit"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except (MemoryError, OverflowError, RecursionError) as error:
        return {"error": f"it needs too much memory ({type(error).__name__})", "kind": "limit"}
    except TemplateError as error:
        return {"error": str(error.message), "kind": "template"}
    except Exception as error:  # the template's own mistake, of any kind: 'None' + str, a missing key, a bad filter argument
        return {"error": f"{type(error).__name__}: {error}", "kind": "template"}


def serve(lines: BinaryIO, answers: BinaryIO) -> None:
    """Read the set-up line, then answer requests until the parent closes the pipe."""
    setup = json.loads(lines.readline())
    sys.path[:] = setup["path"]
    _limit_memory(setup["memory"])
    environment = build_environment()
    from jinja2 import meta

    @functools.lru_cache(maxsize=8)
    def compile_template(source: str) -> tuple[Any, frozenset[str]]:
        return environment.from_string(source), frozenset(meta.find_undeclared_variables(environment.parse(source)))

    for line in lines:
        _set_alarm(setup["seconds"])
        answer = render(compile_template, json.loads(line))
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        _set_alarm(0)


def _set_alarm(seconds: int) -> None:
    """Die after so many seconds (0: don't), in case the parent is gone and can't end an endless template (not on Windows)."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def _limit_memory(limit: int) -> None:
    """Cap the address space, so that a memory bomb is a MemoryError here and no trouble for the machine (not on Windows)."""
    try:
        import resource
    except ImportError:
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (OSError, ValueError):  # macOS refuses; the time limit still holds
        return


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
