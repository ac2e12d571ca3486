"""Where a command's words go: results to stdout, everything else to stderr.

With `--json` the result is one JSON object, and while the command runs, whatever any library prints to stdout lands on stderr
too, so that a program reading stdout can rely on it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

# A model's text may hold escape sequences, which would let it retitle windows or rewrite what is on the screen.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Terminal:
    """One command's output. `json` says whether the result is an object for a program instead of text for a person."""

    def __init__(self, *, json: bool = False) -> None:
        self.json = json
        self._stdout: TextIO = sys.stdout
        self._notes = Console(stderr=True, soft_wrap=True, highlight=False)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Around the command: with `--json`, stdout is kept for `result` alone."""
        with contextlib.redirect_stdout(sys.stderr) if self.json else contextlib.nullcontext():
            yield

    def result(self, values: Mapping[str, Any]) -> None:
        """The JSON object. Numbers that JSON can't say (infinities, NaN) become null."""
        print(json.dumps(_plain(values), allow_nan=False), file=self._stdout, flush=True)

    def write(self, text: str) -> None:
        """A piece of a model's text, at once and without a line break; on a screen its control characters are shown as �."""
        out = sys.stdout
        out.write(_CONTROL.sub("�", text) if out.isatty() else text)
        out.flush()

    def note(self, text: str) -> None:
        """A remark beside the result: dim, on stderr."""
        self._notes.print(Text(text, style="dim"))

    def error(self, text: str) -> None:
        self._notes.print(Text(f"error: {text}", style="red"))

    def table(self, rows: Sequence[Sequence[str]], header: Sequence[str] = (), title: str | None = None) -> None:
        """A table on stdout; the first column is the name of the row. Wide cells wrap, nothing is cut off."""
        table = Table(title=title, title_justify="left", show_header=bool(header), box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for n in range(max(len(row) for row in (*rows, header))):
            table.add_column(header[n] if n < len(header) else "", overflow="fold", style="bold" if n == 0 else None)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console = Console(file=sys.stdout, highlight=False)
        if not console.is_terminal:  # a file or a pipe has no width to respect
            console.width = 200
        console.print(table)

    @contextlib.contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """A spinner on stderr while something takes long; silent where stderr is no screen."""
        if not self._notes.is_terminal:
            yield
            return
        with self._notes.status(Text(label, style="dim")):
            yield


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def human_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
