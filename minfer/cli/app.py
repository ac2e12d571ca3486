"""The table of commands, and how a command line is run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from minfer import __version__
from minfer.cli.bench import bench
from minfer.cli.chat import chat
from minfer.cli.doctor import doctor
from minfer.cli.env import env
from minfer.cli.fit import fit
from minfer.cli.generate import generate
from minfer.cli.inspect_model import inspect_model
from minfer.cli.list_models import list_models
from minfer.cli.models import pull, rm, show
from minfer.cli.perplexity import perplexity
from minfer.cli.ps import ps
from minfer.cli.quantize import quantize
from minfer.cli.serve import serve
from minfer.cli.terminal import Terminal
from minfer.cli.train_draft import train_draft

app = typer.Typer(
    name="minfer",
    help="A compact inference engine for Llama-family models.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a bug's traceback is for us, and plain ones can be copied
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("bench")(bench)
app.command("perplexity")(perplexity)
app.command("quantize")(quantize)
app.command("train-draft")(train_draft)
app.command("inspect")(inspect_model)
app.command("fit")(fit)
app.command("list")(list_models)
app.command("pull")(pull)
app.command("show")(show)
app.command("rm")(rm)
app.command("ps")(ps)
app.command("env")(env)
app.command("doctor")(doctor)

# The base of all complaints about a command line. typer carried click as a package of its own once, and holds a copy now.
_UsageError = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"minfer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; the exit code. A wrong flag is told in a sentence, and with `--json` in JSON as well."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character is no reason to lose the answer
    try:
        code = typer.main.get_command(app).main(list(arguments), prog_name="minfer", standalone_mode=False)
    except typer.Abort:
        return 130
    except Exception as error:
        if not isinstance(error, _UsageError):
            raise
        return _complain(error, json="--json" in arguments)
    return code if isinstance(code, int) else 0


def _complain(error: Exception, *, json: bool) -> int:
    terminal = Terminal(json=json)
    context = getattr(error, "ctx", None)
    message: str = error.format_message()  # type: ignore[attr-defined]
    if not message:  # no arguments at all: typer has printed the help
        return 2
    path = context.command_path if context is not None else "minfer"
    terminal.error(f"{message.rstrip('.')}; try `{path} --help`.")
    if json:
        terminal.result({"error": {"type": "UsageError", "message": message}})
    return 2
