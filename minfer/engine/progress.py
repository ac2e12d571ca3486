"""Progress bars, through rich where it is installed; without it the same code runs silently."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    def advance(self, *, note: str = "") -> None:
        """One more item is done."""


class _Silent:
    def advance(self, *, note: str = "") -> None:
        pass


@contextmanager
def progress_bar(label: str, total: int, enabled: bool = True) -> Iterator[Progress]:
    """A bar on stderr, so that stdout stays the program's own."""
    if not enabled or importlib.util.find_spec("rich") is None:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with RichProgress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, note="")

        class _Bar:
            def advance(self, *, note: str = "") -> None:
                bar.update(task, advance=1, note=note)

        yield _Bar()
