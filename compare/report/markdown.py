"""report.md: every table, every failure, and everything needed to do it again. Losses stand as plainly as wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compare.errors import CompareError
from compare.report import tables
from compare.results import Results

FRONT_NOTE = (
    "Medians; in brackets the share of the roofline. Agreement: share of greedy tokens before the first difference from fp32 "
    "transformers (four-bit rounding of a small model alters nearly all of them). A star: the output is garbage."
)
BEST_NOTE = (
    "Each of minfer's rows against the fastest peer whose weights have as many bits, and against the fastest of all. Ratios are medians "
    "of paired repeats with their 95% interval; above 1 minfer is better."
)
BEGIN, END = "<!-- compare:begin -->", "<!-- compare:end -->"


def render_markdown(results: Results, others: Sequence[Results] = ()) -> str:
    parts = [
        f"# minfer compare: {title(results)}",
        *_warnings(results),
        "## Speed and quality",
        FRONT_NOTE,
        grid(tables.front_grid(results)),
    ]
    parts += ["## Against the best peer", BEST_NOTE, grid(tables.best_peer_grid(results))]
    parts += ["## Every case", grid(tables.summary_grid(results))]
    for table in tables.case_tables(results):
        parts += [f"## {table.title}", _case(table)]
    if failed := tables.failures(results):
        lines = [f"- **{label}**{f' {case}' if case else ''}: {reason}" for label, case, reason in failed]
        parts += ["## What did not run, and why", "\n".join(lines)]
    if others:
        parts += ["## Runs side by side", grid(tables.merged_grid([results, *others]))]
        for run in others:
            parts += [f"### Against the best peer: {title(run)}", grid(tables.best_peer_grid(run))]
    parts += ["## How it was measured", method(results), "## Contenders", grid(tables.contenders_grid(results))]
    return "\n\n".join(parts) + "\n"


def title(results: Results) -> str:
    meta = results.meta
    return f"{meta['model']['name']} on {meta['machine'].get('cpu', meta['device'])}, {meta['started'][:10]}"


def readme_block(results: Results, folder: str) -> str:
    """What stands in the README between the two markers: the table, the machine, and how to get it again."""
    meta = results.meta
    intro = (
        f"{meta['model']['name']}, {len(meta['cpus'])} threads of {meta['machine'].get('cpu', 'this machine')}, medians of "
        f"up to {meta['options']['repeats']} interleaved repeats, {meta['started'][:10]}; in brackets the share of the machine's roofline. "
        f"Agreement: share of greedy tokens before the first difference from fp32 transformers. Repeats, spreads, settings and failures: "
        f"[{folder}/report.md]({folder}/report.md)."
    )
    tables_ = f"{grid(tables.front_grid(results))}\n\n{BEST_NOTE}\n\n{grid(tables.best_peer_grid(results))}"
    return f"{BEGIN}\n{intro}\n\n{tables_}\n\nAgain: `{meta['command']}`\n{END}"


def replace_block(text: str, results: Results, folder: str) -> str:
    """`text` with what stands between the markers replaced. Raises `CompareError` where they are missing."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise CompareError(f"the file has no block to fill: put {BEGIN} and {END} where the table belongs")
    return head + readme_block(results, folder) + tail


def method(results: Results) -> str:
    meta: dict[str, Any] = results.meta
    machine = ", ".join(f"{k}: {v if not isinstance(v, list) else ' '.join(map(str, v))}" for k, v in meta["machine"].items())
    top = ", ".join(f"{k} {v:.3g}" for k, v in meta["ceilings"].items()) or "not measured"
    return "\n".join(
        [
            f"- Command: `{meta['command']}`",
            f"- Machine: {machine}",
            f"- Ceilings measured at the start: {top}; the column *of roofline* is each figure as a share of what they allow",
            f"- Model: {meta['model']['name']}, weights {meta['model']['hash']} (sha-256), the same for every engine",
            f"- CPUs: {meta['cpus']}, every engine pinned to them; {meta['options']['repeats']} repeats, engines in turns A B, B A; "
            "warm-up outside the clock; prefix caching off except in shared-prefix",
            *_time_rules(results),
            "- Figures: median and its 95% bootstrap interval; *minfer against it* is the median ratio of paired repeats, above 1 when "
            "minfer is better; where the interval holds 1 it says *no clear difference*, and of fewer than 3 pairs nothing. A peer is set "
            "against minfer's row of the same precision, or where there is none, of the nearest width in bits",
            "- Times are taken where tokens reach the caller, token ids in and out; greedy, lengths forced. The rules: compare/PROTOCOL.md",
        ]
    )


def _time_rules(results: Results) -> list[str]:
    """Why some figures have fewer repeats than others."""
    options, lines = results.meta["options"], []
    if limit := options.get("case_seconds"):
        lines.append(f"- An engine's repeats of one case stop where one more would make them take over {limit:g} s; the first always runs")
    if minutes := options.get("time_budget"):
        lines.append(f"- Repeats beyond the first were begun, for all engines alike, while they fitted a budget of {minutes:g} minutes")
    return lines + [f"- {note}" for note in results.meta.get("notes", [])]


def grid(table: tables.Grid) -> str:
    """A Markdown table; bars inside cells are escaped, line breaks become <br>."""
    head, lines = table
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(c.replace("|", "\\|").replace("\n", "<br>") for c in row) + " |" for row in rows)


def _case(table: tables.CaseTable) -> str:
    head = ["engine / weights", "median [95%]", "n", "mean ± std", "of roofline", "minfer against it", "note"]
    lines = []
    for row in table.rows:
        if row.spread is None:
            lines.append([row.label, "–", "", "", "", "", row.note])
            continue
        s = row.spread
        mean = f"{tables.number(s.mean)} ± {tables.number(s.std)}" if s.n > 1 else ""
        share = f"{row.share:.0%}" if row.share is not None else ""
        lines.append([row.label, tables.spread_text(s), str(s.n), mean, share, tables.ratio_text(row.ratio, row.partner), row.note])
    return grid((head, lines))


def _warnings(results: Results) -> list[str]:
    return [f"> **Warning:** {w}" for w in results.meta.get("warnings", [])]
