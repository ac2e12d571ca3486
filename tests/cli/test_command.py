from __future__ import annotations

import json
import logging
from collections.abc import Callable

import pytest
import typer
from typer.testing import CliRunner

from minfer.cli.command import command
from minfer.cli.options import engine_flags, sampling_flags
from minfer.cli.terminal import Terminal, human_bytes
from minfer.config import EngineConfig
from minfer.errors import CapacityError, ConfigError, EngineDeadError, MinferError, ModelLoadError, RequestError
from minfer.sampling_params import SamplingParams


def app_of(function: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(function)
    return app


def failing(error: BaseException) -> typer.Typer:
    @command()
    def fail(terminal: Terminal) -> None:
        raise error

    return app_of(fail)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("no"), 2),
        (RequestError("no", param="top_p", code="bad"), 2),
        (ModelLoadError("no"), 2),
        (CapacityError("no"), 1),
        (EngineDeadError("no"), 1),
        (MinferError("no"), 1),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(error: MinferError, code: int) -> None:
    result = CliRunner().invoke(failing(error))
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "error: no\n")
    result = CliRunner().invoke(failing(error), ["--json"])
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"] == {"type": type(error).__name__, "message": "no"} | (
        {"param": "top_p", "code": "bad"} if isinstance(error, RequestError) else {}
    )


def test_ctrl_c_is_quiet() -> None:
    result = CliRunner().invoke(failing(KeyboardInterrupt()))
    assert (result.exit_code, result.output) == (130, "")


def test_a_bug_keeps_its_traceback() -> None:
    result = CliRunner().invoke(failing(ZeroDivisionError("bug")))
    assert isinstance(result.exception, ZeroDivisionError)


def test_groups_and_own_parameters() -> None:
    seen: dict[str, object] = {}

    @command(engine=engine_flags(leave_out=["seed"]), sampling=sampling_flags())
    def show(terminal: Terminal, engine: EngineConfig, sampling: SamplingParams, word: str, count: int = 1) -> None:
        """Shows."""
        seen.update(engine=engine, sampling=sampling, word=word, count=count)

    arguments = ["the-model", "hello", "--kv-cache-memory", "1.5G", "--no-prefix-caching", "--seed", "7", "--stop", "a", "--stop", "b"]
    result = CliRunner().invoke(app_of(show), arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert seen == {
        "engine": EngineConfig(model="the-model", kv_cache_memory=3 << 29, prefix_caching=False),
        "sampling": SamplingParams(seed=7, stop=("a", "b")),
        "word": "hello",
        "count": 1,
    }


def test_json_keeps_stdout_for_the_result() -> None:
    @command()
    def chatty(terminal: Terminal) -> None:
        print("a library says something")
        terminal.write("text")
        terminal.result({"x": float("inf"), "y": [float("nan"), 1.5], "z": (1, 2)})

    result = CliRunner().invoke(app_of(chatty), ["--json"], catch_exceptions=False)
    assert json.loads(result.stdout) == {"x": None, "y": [None, 1.5], "z": [1, 2]}
    assert result.stdout.count("\n") == 1
    assert "a library says something" in result.stderr


@pytest.mark.parametrize(("flags", "shown"), [([], ["warn"]), (["-v"], ["warn", "info"]), (["-vv"], ["warn", "info", "debug"])])
def test_verbosity(flags: list[str], shown: list[str]) -> None:
    @command()
    def log(terminal: Terminal) -> None:
        logger = logging.getLogger("minfer.test")
        logger.warning("warn")
        logger.info("info")
        logger.debug("debug")

    result = CliRunner().invoke(app_of(log), flags, catch_exceptions=False)
    assert [line.split()[-1] for line in result.stderr.splitlines()] == shown
    assert result.stdout == ""
    assert not logging.getLogger("minfer").handlers  # the process is left as it was


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 29, "1.50 GiB"), (1 << 41, "2048.00 GiB")],
)
def test_human_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text
