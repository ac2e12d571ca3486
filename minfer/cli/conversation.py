"""A conversation with a model: its messages, its settings, and the slash commands that change them. No terminal in here.

Each turn sends the whole conversation through the chat template again; the prefix cache makes that cheap, since all but the new
message has been computed. A turn that fails leaves the conversation as it was.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minfer.cli.engine import run_request, summary, timings
from minfer.cli.options import sampling_flags
from minfer.errors import RequestError
from minfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minfer.engine.llm import LLM

# A chat shows one answer as text. It ends when the model ends it, or the context does.
SAMPLING = sampling_flags(leave_out=["n", "logprobs", "prompt_logprobs"], max_tokens=None)


class Leave(Exception):
    """The user asked to end the chat."""


class Conversation:
    """`messages` are OpenAI's; `turns` records how each reply ended and how fast it came."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self.llm = llm
        self.params = params
        self.messages: list[dict[str, str]] = []
        self.turns: list[dict[str, Any]] = []
        if system:
            self._set_system(system)
        self._commands: dict[str, tuple[str, str, Callable[[str], str]]] = {
            "/help": ("", "show this", self._help),
            "/reset": ("", "forget the conversation, keep the system message", self._reset),
            "/system": ("TEXT", "set the system message and start over; without TEXT, none", self._system),
            "/set": ("[PARAM VALUE]", "change a sampling parameter; without arguments, show them all", self._set),
            "/save": ("FILE", "write the conversation to a JSON file", self._save),
            "/exit": ("", "leave (also /quit, Ctrl-D)", self._exit),
        }

    def say(self, message: str, write: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        """Sends a message and streams the reply; returns a line about it. Raises RequestError if it can't be sent."""
        messages = [*self.messages, {"role": "user", "content": message}]
        try:
            ids = self.llm.get_tokenizer().apply_chat_template(messages)
            output = run_request(self.llm, ids, self.params, say=write, stopped=stopped)
        except RequestError as error:
            if error.code == "context_length_exceeded":
                reason = (
                    f"the conversation is longer than the model's {self.llm.engine.inputs.max_model_len} tokens; /reset starts a new one"
                )
                raise RequestError(reason, param=error.param, code=error.code) from error
            raise
        answer = output.outputs[0]
        if answer.token_ids:
            self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        cached = output.num_cached_tokens
        self.turns.append(
            {
                "prompt_tokens": len(ids),
                "cached_tokens": cached,
                "completion_tokens": len(answer.token_ids),
                "finish_reason": answer.finish_reason,
                "timings": timings(output.metrics),
            }
        )
        return summary(output).replace("abort", "stopped")

    def obey(self, line: str) -> str:
        """Carries out a slash command; returns what to tell the user. Raises RequestError or ConfigError for a bad one."""
        name, _, argument = line.strip().partition(" ")
        name = "/exit" if name == "/quit" else name
        if name not in self._commands:
            raise RequestError(f"there is no command {name}; /help lists them")
        return self._commands[name][2](argument.strip())

    def _help(self, _: str) -> str:
        rows = [(f"{name} {arguments}".strip(), meaning) for name, (arguments, meaning, _) in self._commands.items()]
        lines = [f"  {usage:<22}{meaning}" for usage, meaning in rows]
        return "\n".join([*lines, "  A line that ends in \\ goes on in the next one. Ctrl-C stops a reply."])

    def _reset(self, _: str) -> str:
        self.messages = [m for m in self.messages if m["role"] == "system"]
        return "started a new conversation"

    def _system(self, text: str) -> str:
        self._set_system(text)
        return "started a new conversation with this system message" if text else "started a new conversation without a system message"

    def _set_system(self, text: str) -> None:
        self.messages = [{"role": "system", "content": text}] if text else []

    def _set(self, text: str) -> str:
        flags = {flag.name: flag for flag in SAMPLING.flags()}
        if not text:
            return "\n".join(f"  {name} {_shown(getattr(self.params, name))}" for name in flags)
        name, _, value = text.partition(" ")
        name = name.replace("-", "_").removeprefix("__")
        if name not in flags:
            raise RequestError(f"there is no sampling parameter {name!r}; known are {', '.join(flags)}")
        if not value.strip():
            return f"{name} {_shown(getattr(self.params, name))}"
        change: dict[str, Any] = {name: flags[name].parse(_unquoted(value.strip()))}
        self.params = dataclasses.replace(self.params, **change)
        return f"{name} {_shown(getattr(self.params, name))}"

    def _save(self, text: str) -> str:
        if not text:
            raise RequestError("/save needs the name of a file")
        path = Path(_unquoted(text)).expanduser()
        settings = {flag.name: getattr(self.params, flag.name) for flag in SAMPLING.flags()}
        content = {"model": self.llm.engine.config.model, "messages": self.messages, "sampling": settings}
        try:
            path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=dict) + "\n", encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{path} can't be written: {error.strerror or error}") from error
        return f"saved {len(self.messages)} messages to {path}"

    def _exit(self, _: str) -> str:
        raise Leave


def _shown(value: Any) -> str:
    return "none" if value is None else "on" if value is True else "off" if value is False else json.dumps(value, default=dict)


def _unquoted(text: str) -> str:
    """A quoted text as a shell would read it, so that spaces and quotes can be given; others as they are."""
    if text[:1] not in ("'", '"'):
        return text
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RequestError(f"{text} has a quote that is not closed") from error
    return words[0] if len(words) == 1 else text
