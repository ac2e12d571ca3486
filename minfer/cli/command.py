"""What all commands share: `--json`, `-v`, exit codes, and errors as one sentence instead of a traceback.

    0    done
    1    minfer's or the machine's fault (no room, the engine died)
    2    the user's: a setting, a request or a model that can't be used
    130  Ctrl-C

A failed command prints `error: ...` on stderr, and with `--json` also `{"error": {...}}` on stdout. Anything that is not a
MinferError is a bug, and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import typer

from minfer.cli.options import FlagGroup
from minfer.cli.terminal import Terminal
from minfer.errors import ConfigError, MinferError, ModelLoadError, RequestError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def command(**groups: FlagGroup[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a typer command of `function(terminal, **groups built, **its own parameters)`.

    The generated flags stand where the function has one parameter per group. Positional fields (the model) come first.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def run(*, json: bool, verbose: int, **values: Any) -> None:
            terminal = Terminal(json=json)
            try:
                with terminal.session(), logging_to_stderr(verbose):
                    built = {name: group.build(values) for name, group in groups.items()}
                    function(terminal, **built, **values)
            except MinferError as error:
                report(terminal, error)
                raise typer.Exit(2 if isinstance(error, (ConfigError, RequestError, ModelLoadError)) else 1) from error
            except KeyboardInterrupt:
                raise typer.Exit(INTERRUPTED) from None

        parameters = [*_own_parameters(function, groups), *_COMMON]
        for group in groups.values():
            parameters += group.parameters()
        parameters.sort(key=lambda p: p.name != "model")  # stable: arguments are read in the order of the parameters
        run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


_COMMON = [
    inspect.Parameter(
        "json",
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(False, "--json", help="Print one JSON object to stdout, and everything else to stderr."),
        annotation=bool,
    ),
    inspect.Parameter(
        "verbose",
        inspect.Parameter.KEYWORD_ONLY,
        default=typer.Option(
            0, "-v", "--verbose", count=True, help="Show what is being done on stderr; -vv shows more.", show_default=False
        ),
        annotation=int,
    ),
]


def _own_parameters(function: Callable[..., None], groups: dict[str, FlagGroup[Any]]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    return [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "terminal" and name not in groups
    ]


def report(terminal: Terminal, error: MinferError) -> None:
    """Tells about a failure: on stderr, and in JSON where that was asked for."""
    terminal.error(str(error))
    if terminal.json:
        details = {"type": type(error).__name__, "message": str(error)}
        if isinstance(error, RequestError):
            details |= {key: value for key, value in (("param", error.param), ("code", error.code)) if value is not None}
        terminal.result({"error": details})


@contextlib.contextmanager
def logging_to_stderr(verbose: int) -> Iterator[None]:
    """minfer's log on stderr: warnings, with -v what is done, with -vv everything. Only for as long as the command runs."""
    logger = logging.getLogger("minfer")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel([logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)])
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
