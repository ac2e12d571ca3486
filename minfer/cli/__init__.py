"""The command line: `minfer generate`, `chat`, `serve`; `pull`, `list`, `show`, `rm`, `fit`, `inspect`, `quantize`; `ps`; `bench`,
`perplexity`; `env`, `doctor`.

One file per command; `options.py` makes the flags out of the dataclasses they fill, `command.py` gives every command the same
manners (`--json`, `-v`, exit codes, errors in one sentence). Heavy things (torch, the engine, the server) are imported inside
the commands, so that `minfer --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line (default: this process's) and returns its exit code."""
    try:
        from minfer.cli.app import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        print(f'error: the command line needs {missing}, not installed here; install it with: pip install "minfer[cli]"', file=sys.stderr)
        return 1
    return run(sys.argv[1:] if arguments is None else arguments)
