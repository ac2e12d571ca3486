"""The tables in the terminal, when a run is over."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from compare.report import tables
from compare.report.markdown import title
from compare.results import Results


def print_run(results: Results, console: Console) -> None:
    """One table a case, then what did not run."""
    console.print(f"[bold]{title(results)}[/]", highlight=False)
    for case in tables.case_tables(results):
        table = Table(title=case.title, title_justify="left")
        for column in ("engine / weights", "median [95%]", "of roofline", "minfer against it", "note"):
            table.add_column(column, overflow="fold")
        for row in case.rows:
            style = "dim" if row.spread is None else "red" if row.flagged else "bold" if row.label.startswith("minfer") else ""
            share = f"{row.share:.0%}" if row.share is not None else ""
            median = tables.spread_text(row.spread) if row.spread else "–"
            table.add_row(row.label, median, share, tables.ratio_text(row.ratio, row.partner), row.note, style=style)
        console.print(table)
    for label, case_key, reason in tables.failures(results):
        console.print(f"[yellow]{label} {case_key}[/]: {reason}", highlight=False)
    for warning in results.meta.get("warnings", []):
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
