"""Chat templates: from messages to the one text that the model was trained to continue.

Three things make this more than a call to jinja2:

- *The template is a program out of a downloaded file.* It runs in a sandboxed process of its own, with limits on time, memory
  and output (`chat_worker.py` says why a process and not a thread).
- *Special tokens in a message are text.* A user who writes `<|im_start|>system` must not be able to open a system turn. Before
  rendering, every special token that occurs inside the caller's strings is broken by an unguessable private-use marker; after
  rendering, the special tokens that are still whole are the template's own. Only those are tokenised as special tokens, and
  the markers are removed (`Tokenizer.apply_chat_template`). Content without special tokens isn't touched, so its ids
  are exactly those of the Hugging Face tokenizer, and filters such as `trim` see the real content.
- *Bad messages are the caller's fault.* They, and a template's own complaint ("roles must alternate"), are a RequestError.

Templates that build a special token out of a role (`'<|' + role + '|>'`) get only roles that are conventional, or that neither
hold a special token nor lie inside one. Left out: a template whose filters delete or recase characters could still assemble a
special token from the caller's text (none is known), and special tokens of a single character are not broken.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from minfer.errors import ConfigError, RequestError

RENDER_SECONDS = 5.0
RENDER_CHARACTERS = 1 << 24
WORKER_MEMORY = 1 << 30
RESERVED_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt"})
CONVENTIONAL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function", "ipython"})


class TemplateRunner:
    """Runs templates in the worker process, started on first use and again after it had to be killed. Safe to share by threads."""

    def __init__(self, seconds: float = RENDER_SECONDS, characters: int = RENDER_CHARACTERS, memory: int = WORKER_MEMORY) -> None:
        self._seconds, self._characters, self._memory = seconds, characters, memory
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, template: str, variables: Mapping[str, Any], options: Mapping[str, Any]) -> str:
        """The template's text. Raises RequestError with the template's message, or saying which limit it passed."""
        request = {"template": template, "variables": variables, "options": options, "limit": self._characters}
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages, tools and template options must be plain JSON values: {error}.", param="messages") from error
        with self._lock:
            answer = self._ask(line)
        if "text" in answer:
            return answer["text"]
        if answer["kind"] == "options":
            raise RequestError(f"This model's chat template has no option named {answer['error']}.", param="chat_template_kwargs")
        if answer["kind"] == "limit":
            raise RequestError(f"The chat template was stopped: {answer['error']}.", param="messages")
        raise RequestError(f"The chat template refused these messages: {answer['error']}", param="messages")

    def _ask(self, line: bytes) -> dict[str, str]:
        worker = self._running_worker()
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            worker.kill()

        timer = threading.Timer(self._seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            _pipe(worker.stdin).write(line)
            _pipe(worker.stdin).flush()
            reply = _pipe(worker.stdout).readline()
        except OSError:  # the worker died while we wrote
            reply = b""
        finally:
            timer.cancel()
        if reply.endswith(b"\n") and not timed_out.is_set():
            answer: dict[str, str] = json.loads(reply)
            return answer
        _end(worker)
        self._worker = None
        reason = f"it ran for more than {self._seconds:g} s" if timed_out.is_set() else "its process ended (out of memory, most likely)"
        return {"error": reason, "kind": "limit"}

    def _running_worker(self) -> subprocess.Popen[bytes]:
        """The worker of this process; a forked child must not share its parent's pipe, so it starts its own."""
        if self._worker is None or self._owner != os.getpid() or self._worker.poll() is not None:
            _require_jinja2()
            script = str(Path(__file__).with_name("chat_worker.py"))
            self._worker = subprocess.Popen(
                [sys.executable, "-I", "-S", script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C at the terminal is for the program, not for its template
            )
            self._owner = os.getpid()
            weakref.finalize(self, _end_own, self._worker, self._owner)
            path = [os.path.abspath(entry) for entry in sys.path]
            setup = {"path": path, "memory": self._memory, "seconds": math.ceil(self._seconds) + 1}
            _pipe(self._worker.stdin).write(json.dumps(setup).encode() + b"\n")
        return self._worker


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise OSError("the chat template's process has no pipe")
    return pipe


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        try:
            _pipe(pipe).close()
        except OSError:  # unsent bytes of a request that is being given up
            continue
    worker.wait()


def _end_own(worker: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:  # a forked child that exits must leave its parent's worker alone
        _end(worker)


def _require_jinja2() -> None:
    try:
        import jinja2
    except ImportError as error:
        raise ConfigError('Chat templates need jinja2: pip install "minfer[chat]".') from error
    if tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
        raise ConfigError(f'jinja2 {jinja2.__version__} has known holes in its sandbox: pip install "jinja2>=3.1.6".')


class SpecialTokenMarker:
    """Breaks special tokens in the caller's strings, and mends them after the template has run.

    `specials` are the texts of the special tokens. `mark` and `unmark` are inverse on any text that doesn't hold the marker,
    three random private-use characters that are drawn anew for each rendering.
    """

    def __init__(self, specials: Iterable[str]) -> None:
        self.marker = "".join(chr(0xF0000 + secrets.randbelow(0xFFFD)) for _ in range(3))
        self._pattern = re.compile("(?=" + ("|".join(re.escape(text) for text in specials if len(text) > 1) or "(?!)") + ")(.)", re.DOTALL)
        self.marked_any = False

    def mark(self, value: Any) -> Any:
        """`value` (strings, lists and dicts of them) with a marker after the first character of each special token in it."""
        if isinstance(value, str):
            marked, count = self._pattern.subn(lambda match: match[1] + self.marker, value)
            self.marked_any = self.marked_any or count > 0
            return marked
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark(item) for item in value]
        return value

    def unmark(self, text: str) -> str:
        """The text as the template wrote it, also where `tojson(ensure_ascii=true)` spelled the marker in ASCII."""
        return text.replace(self.marker, "").replace(json.dumps(self.marker)[1:-1], "")


def normalise_messages(messages: Sequence[Mapping[str, Any]], specials: Iterable[str]) -> list[dict[str, Any]]:
    """Validated copies of OpenAI-style messages: content parts joined into one string, tool-call arguments as objects.

    Several text parts are joined by newlines, as other servers do. `arguments` that hold a JSON object as a string are parsed,
    because templates print them with `tojson`. Raises RequestError naming the message and the field.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a non-empty list of objects with a role and a content.", param="messages")
    texts = tuple(specials)
    return [_normalise_message(message, f"messages[{index}]", texts) for index, message in enumerate(messages)]


def _normalise_message(message: Mapping[str, Any], where: str, specials: Sequence[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with a role and a content, not {type(message).__name__}.", param=where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role must be a non-empty string.", param=f"{where}.role")
    if role not in CONVENTIONAL_ROLES and any(role in text or text in role for text in specials):
        raise RequestError(f"{where}.role {role!r} could form a special token of this model.", param=f"{where}.role")
    plain = dict(message)
    if "content" in message:
        plain["content"] = _flatten_content(message["content"], where)
    elif not message.get("tool_calls"):
        raise RequestError(f"{where} has no content.", param=f"{where}.content")
    if message.get("tool_calls"):
        plain["tool_calls"] = _parse_arguments(message["tool_calls"], where)
    return plain


def _flatten_content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{where}.content must be a string, null or a list of text parts.", param=f"{where}.content")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind != "text" or not isinstance(part.get("text"), str):
            reason = f"{where}.content[{index}] is a part of type {kind!r}; this model reads text parts only."
            raise RequestError(reason, param=f"{where}.content")
        texts.append(part["text"])
    return "\n".join(texts)


def _parse_arguments(tool_calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(tool_calls, (list, tuple)) or not all(isinstance(call, Mapping) for call in tool_calls):
        raise RequestError(f"{where}.tool_calls must be a list of objects.", param=f"{where}.tool_calls")
    parsed = []
    for call in tool_calls:
        function = call.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"])
            except ValueError:
                arguments = None
            if isinstance(arguments, dict):
                call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(dict(call))
    return parsed


def select_template(templates: Mapping[str, str], with_tools: bool) -> str:
    """The template to use: `tool_use` for a request with tools where the checkpoint has one, else the default one."""
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    if not templates:
        raise RequestError("This model's checkpoint has no chat template, so it can only complete plain prompts.", param="messages")
    raise RequestError(f"This model has no default chat template, only: {', '.join(sorted(templates))}.", param="messages")


def check_options(options: Mapping[str, Any], own_variables: Iterable[str]) -> None:
    """Refuse options that would replace what minfer itself hands to the template (messages, tools, special tokens)."""
    taken = sorted(set(options) & (RESERVED_VARIABLES | set(own_variables)))
    if taken:
        raise RequestError(f"{', '.join(taken)} can't be set through template options.", param="chat_template_kwargs")


def open_final_message(messages: list[dict[str, Any]]) -> str:
    """Append a mark to the last message's content, in place, and return it: `cut_at` ends the rendered text there."""
    final = messages[-1]
    if not isinstance(final.get("content"), str) or not final["content"]:
        raise RequestError("continue_final_message needs a last message with text to continue.", param="continue_final_message")
    mark = "".join(chr(0xF0000 + secrets.randbelow(0xFFFD)) for _ in range(3))
    final["content"] += mark + " "
    return mark


def cut_at(text: str, mark: str) -> str:
    """The text up to the mark. A template that trims its messages would have trimmed the open one too, so it is trimmed here."""
    position = text.rfind(mark)
    if position < 0:
        raise RequestError("This model's chat template drops the last message, so it can't be continued.", param="continue_final_message")
    kept = text[position + len(mark) :].startswith(" ")
    return text[:position] if kept else text[:position].rstrip()
