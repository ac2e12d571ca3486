"""`minfer chat`: the conversation by itself, then the program on a real pseudo-terminal, keys and all."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_flags import TINY

import minfer as package
from minfer import LLM, SamplingParams
from minfer.cli.conversation import Conversation, Leave
from minfer.errors import ConfigError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), dtype="float32", threads=1, kv_cache_memory=16 << 20)


def silent(text: str) -> None:
    pass


def never() -> bool:
    return False


def test_turns_build_on_each_other(llm: LLM) -> None:
    conversation = Conversation(llm, GREEDY, "Be brief.")
    pieces: list[str] = []
    summary = conversation.say("Hello, you there", pieces.append, never)
    assert "8 tokens" in summary
    conversation.say("And again?", silent, never)
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.messages[2]["content"] == "".join(pieces)
    # The whole conversation went to the model, in the words of its own template.
    [expected] = llm.chat(conversation.messages[:4], GREEDY, use_tqdm=False)
    assert conversation.messages[4]["content"] == expected.outputs[0].text
    assert conversation.turns[1]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert conversation.turns[1]["cached_tokens"] > 0
    assert conversation.turns[1]["finish_reason"] == "length"


def test_a_stopped_reply_stays_as_far_as_it_got(llm: LLM) -> None:
    conversation = Conversation(llm, SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)

    summary = conversation.say("Hello", write, lambda: len(pieces) >= 5)
    assert "stopped" in summary
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(pieces)}
    assert conversation.turns[0]["finish_reason"] == "abort"
    assert llm.engine.core.scheduler.pool.num_used == 0
    assert not llm.engine.has_unfinished_requests


def test_stopped_before_the_first_token_leaves_nothing(llm: LLM) -> None:
    conversation = Conversation(llm, GREEDY)
    conversation.say("Hello", silent, lambda: True)
    assert conversation.messages == []


def test_a_full_context_leaves_the_conversation_as_it_was(llm: LLM) -> None:
    conversation = Conversation(llm, GREEDY)
    conversation.say("Hello", silent, never)
    before = list(conversation.messages)
    with pytest.raises(RequestError, match="/reset"):
        conversation.say("word " * 600, silent, never)
    assert conversation.messages == before
    conversation.say("short", silent, never)
    assert len(conversation.messages) == 4


def test_reset_and_system(llm: LLM) -> None:
    conversation = Conversation(llm, GREEDY, "Be kind.")
    conversation.say("Hello", silent, never)
    conversation.obey("/reset")
    assert conversation.messages == [{"role": "system", "content": "Be kind."}]
    conversation.obey("/system Be brief, please.")
    assert conversation.messages == [{"role": "system", "content": "Be brief, please."}]
    conversation.obey("/system")
    assert conversation.messages == []


def test_set(llm: LLM) -> None:
    conversation = Conversation(llm, GREEDY)
    assert "temperature 0.5" in conversation.obey("/set temperature 0.5")
    conversation.obey("/set max-tokens none")
    conversation.obey("/set stop 'the end'")
    conversation.obey("/set logit_bias 5=-1 6=2")
    params = conversation.params
    assert (params.temperature, params.max_tokens, params.stop) == (0.5, None, ("the end",))
    assert dict(params.logit_bias or {}) == {5: -1.0, 6: 2.0}
    shown = conversation.obey("/set")
    assert "  temperature 0.5\n" in shown
    assert "  max_tokens none\n" in shown
    assert conversation.obey("/set temperature") == "temperature 0.5"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/set temperature hot", ConfigError),
        ("/set temperature -1", RequestError),
        ("/set n 2", RequestError),
        ("/set nonsense 1", RequestError),
        ("/save", RequestError),
        ("/save /no/such/folder/x.json", RequestError),
        ("/nonsense", RequestError),
        ("/set stop 'open", RequestError),
    ],
)
def test_bad_commands_change_nothing(llm: LLM, line: str, error: type[Exception]) -> None:
    conversation = Conversation(llm, GREEDY)
    with pytest.raises(error):
        conversation.obey(line)
    assert conversation.params == GREEDY


def test_save_help_and_exit(llm: LLM, tmp_path: Path) -> None:
    conversation = Conversation(llm, GREEDY, "Grüße")
    conversation.say("Hello", silent, never)
    conversation.obey("/set logit_bias 5=-1")
    conversation.obey(f"/save '{tmp_path}/a b.json'")
    saved = json.loads((tmp_path / "a b.json").read_text(encoding="utf-8"))
    assert saved["messages"] == conversation.messages
    assert saved["sampling"]["logit_bias"] == {"5": -1.0}
    for name in ("/help", "/reset", "/system", "/set", "/save", "/exit"):
        assert name in conversation.obey("/help")
    for line in ("/exit", "/quit"):
        with pytest.raises(Leave):
            conversation.obey(line)


def test_piped_input(minfer: Callable, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--temperature", 0, "--max-tokens", 4, "--ignore-eos", "--system", "Be brief.", *TINY]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello \\\nthere\n\n/set max_tokens 2\nMore\n"))
    values = minfer("chat", tiny_llama, "--json", *flags).json
    assert [m["role"] for m in values["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert values["messages"][1]["content"] == "Hello \nthere"
    assert [turn["completion_tokens"] for turn in values["turns"]] == [4, 2]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/exit\nNot read\n"))
    ran = minfer("chat", tiny_llama, *flags)
    assert ran.code == 0
    assert ran.out.count("\n") >= 1
    assert "first after" in ran.err


def test_a_script_stops_at_its_first_error(minfer: Callable, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/set temperature hot\nHello\n"))
    ran = minfer("chat", tiny_llama, "--json", *TINY)
    assert ran.code == 2
    assert "temperature" in ran.json["error"]["message"]


def test_a_model_without_a_template_cannot_chat(minfer: Callable, tiny_llama: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_llama / name).read_bytes())
    ran = minfer("chat", tmp_path, *TINY)
    assert ran.code == 2
    assert "chat template" in ran.err


def test_two_interrupts_at_the_prompt_leave(minfer: Callable, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[str | type[BaseException]] = [KeyboardInterrupt, "/help", KeyboardInterrupt, KeyboardInterrupt, "never read"]

    def read(prompt: str) -> str:
        item = typed.pop(0)
        if isinstance(item, str):
            return item
        raise item

    monkeypatch.setattr("builtins.input", read)
    ran = minfer("chat", tiny_llama, *TINY)
    assert (ran.code, typed) == (0, ["never read"])
    assert ran.err.count("Ctrl-C again") == 2


class Session:
    """`minfer chat` in a child process whose terminal we hold the other end of."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(Path(package.__file__).parents[1])
            os.execve(sys.executable, [sys.executable, "-m", "minfer", "chat", *arguments], {**os.environ, **environment})
        self.screen = ""
        self.code: int | None = None

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def interrupt(self) -> None:
        """Ctrl-C, with pauses that no finger needs: Python's readline shows the prompt a moment before it listens for signals, and a
        terminal drops what is written while it handles the key."""
        time.sleep(0.5)
        self.type("\x03")
        time.sleep(0.5)

    def interrupt_prompt(self) -> None:
        self.wait_for(">>> ")
        self.interrupt()

    def wait_for(self, pattern: str, seconds: float = 120.0) -> str:
        """Reads until the pattern is on the screen; returns all that came before and with it, and forgets that."""
        deadline = time.monotonic() + seconds
        while (match := re.search(pattern, self.screen)) is None:
            assert self._read(deadline), f"{pattern!r} never came; on the screen: {self.screen!r}"
        seen, self.screen = self.screen[: match.end()], self.screen[match.end() :]
        return seen

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.terminal], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            data = os.read(self.terminal, 1 << 16)
        except OSError:  # the child is gone
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)

    def finish(self, seconds: float = 60.0) -> int:
        """The exit code."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def close(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.terminal)


@pytest.fixture
def session(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Session]:
    """A model with a long context that never ends by itself, so that a reply is still running when a key is pressed."""
    folder = make_checkpoint("llama", max_position_embeddings=16384)
    environment = {"XDG_STATE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"}
    session = Session([str(folder), "--ignore-eos", "--temperature", "0.5", *map(str, TINY)], environment)
    yield session
    session.close()


def test_ctrl_c_stops_a_reply_and_not_the_program(session: Session, tmp_path: Path) -> None:
    session.wait_for(">>> ")
    session.type("Hello\n")
    session.wait_for(r"Hello\r\n[^\0]{40,}")  # the echo of what was typed, and the beginning of the reply
    session.interrupt()
    session.type("/set max_tokens 3\n")
    session.wait_for("max_tokens 3\r\n")
    session.wait_for(">>> ")
    session.type("Again\n")  # the engine is as good as new
    session.wait_for(r"3 tokens, [^\r]*length")
    session.wait_for(">>> ")
    session.type(f"/save {tmp_path}/saved.json\n")
    session.wait_for("saved 4 messages")
    saved = json.loads((tmp_path / "saved.json").read_text(encoding="utf-8"))
    assert len(saved["messages"][1]["content"]) >= 40  # as far as it got
    session.wait_for(">>> ")
    session.type("/nonsense\n")
    session.wait_for("there is no command /nonsense")
    session.interrupt_prompt()
    session.type("/reset\n")  # in between, so the next one is a first one again
    session.wait_for("new conversation")
    session.interrupt_prompt()
    session.type("\x03")
    assert session.finish() == 0
    assert "Traceback" not in session.screen
    history = tmp_path / "minfer" / "chat_history"
    assert "Hello" in history.read_text().splitlines()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


@pytest.mark.parametrize("keys", ["\x04", "/exit\n"])
def test_leaving(session: Session, keys: str) -> None:
    session.wait_for(">>> ")
    session.type(keys)
    assert session.finish() == 0
    assert "Traceback" not in session.screen
