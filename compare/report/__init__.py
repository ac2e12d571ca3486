"""Reports of a run: report.md (also the source of the README's table) and report.html (one file, plots inside)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compare.report.html import render_html
from compare.report.markdown import render_markdown
from compare.results import Results


def write_reports(results: Results, folder: Path, others: Sequence[Results] = ()) -> None:
    """Writes both reports into `folder`. others: further runs, shown side by side with this one."""
    (folder / "report.md").write_text(render_markdown(results, others), encoding="utf-8")
    (folder / "report.html").write_text(render_html(results, folder, others), encoding="utf-8")
