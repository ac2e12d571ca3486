"""`minfer chat`: a conversation in the terminal. What a conversation is stands in `conversation.py`; this file is the screen.

Ctrl-C belongs to whatever is going on: during a reply it ends the reply, which stays in the conversation as far as it got; at
the prompt it drops the line, and twice in a row it leaves. A reply is ended between two steps of the engine, never inside one; a
second Ctrl-C during the same reply doesn't wait for that, and so ends the program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from minfer.cli.command import command
from minfer.cli.conversation import SAMPLING, Conversation, Leave
from minfer.cli.engine import load_llm, only_adapter
from minfer.cli.options import engine_flags
from minfer.cli.terminal import Terminal
from minfer.config import EngineConfig
from minfer.errors import CapacityError, ConfigError, RequestError
from minfer.sampling_params import SamplingParams

PROMPT = ">>> "
CONTINUED = "... "
HISTORY_LENGTH = 1000


@command(engine=engine_flags(leave_out=["seed"]), sampling=SAMPLING)
def chat(
    terminal: Terminal,
    engine: EngineConfig,
    sampling: SamplingParams,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.", show_default=False)] = None,
    history: Annotated[bool, typer.Option("--history/--no-history", help="Keep typed lines for the next chat's arrow keys.")] = True,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-D leaves."""
    only_adapter(engine)
    llm, phases = load_llm(terminal, engine)
    if llm.get_tokenizer().chat_template is None:
        raise ConfigError(
            f"{engine.model} has no chat template, so it can't chat; use `minfer generate`, or give --tokenizer one that has it"
        )
    conversation = Conversation(llm, sampling, system)
    interactive = sys.stdin.isatty()
    if interactive:
        terminal.note("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
    with line_editing(interactive and history):
        _talk(terminal, conversation, interactive)
    if terminal.json:
        terminal.result({"model": engine.model, "messages": conversation.messages, "turns": conversation.turns, "load_seconds": phases})


def _talk(terminal: Terminal, conversation: Conversation, interactive: bool) -> None:
    interrupted = False
    while True:
        try:
            line = read_line(interactive)
        except KeyboardInterrupt:
            if interrupted:
                break
            interrupted = True
            terminal.note("\nCtrl-C again, Ctrl-D or /exit leaves")
            continue
        except EOFError:
            break
        interrupted = False
        try:
            if line.startswith("/"):
                terminal.note(conversation.obey(line))
            elif line.strip():
                reply(terminal, conversation, line)
        except Leave:
            break
        except (RequestError, ConfigError, CapacityError) as error:
            if not interactive:  # a script's next lines build on this one
                raise
            terminal.error(str(error))
    if interactive:
        terminal.note("")


def read_line(interactive: bool) -> str:
    r"""One message; a line that ends in a backslash goes on in the next one. Raises EOFError at the end of input."""
    lines = [input(PROMPT if interactive else "")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(CONTINUED if interactive else ""))
    return "\n".join(lines)


def reply(terminal: Terminal, conversation: Conversation, message: str) -> None:
    """Streams the answer to a message, which Ctrl-C ends."""
    with ctrl_c_flag() as stopped:
        summary = conversation.say(message, terminal.write, stopped)
    terminal.write("\n")
    terminal.note(summary)


@contextlib.contextmanager
def ctrl_c_flag() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only sets a flag; a second one interrupts as usual, in case a step takes too long."""
    pressed = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def line_editing(keep: bool) -> Iterator[None]:
    """Arrow keys at the prompt, and the lines of earlier chats where they are kept. Does without on systems that have no readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    file = history_file()
    if keep:
        with contextlib.suppress(OSError):  # no history yet
            readline.read_history_file(file)
        readline.set_history_length(HISTORY_LENGTH)
    try:
        yield
    finally:
        if keep:
            with contextlib.suppress(OSError):  # a read-only home is no reason to fail
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)  # what people tell a model is theirs
                readline.write_history_file(file)


def history_file() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "minfer" / "chat_history"
