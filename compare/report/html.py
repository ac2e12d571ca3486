"""report.html: one self-contained file, readable in light and dark, on paper and on a phone. No script, no outside resource."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from compare.measure import percentile
from compare.report import markdown, svg, tables
from compare.results import Results

# Sixteen that differ in hue or lightness and can be told apart on white and on near-black.
_COLOURS = (
    "#0b7a75", "#2fb59f", "#86c440", "#4d8f1f",
    "#c2571a", "#f2a03d", "#5b5bd6", "#b8336a",
    "#1f8fd6", "#74b9f0", "#8a6d3b", "#d84b4b",
    "#9b59b6", "#d48ad9", "#607d8b", "#b5a100",
)  # fmt: skip

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2327;--soft:#5c666d;--paper:#fbfbf9;--card:#fff;--line:#e2e4e1;--ours:#0b7a75;
--theirs:#a9b4ba;--warn:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e8e6;--soft:#9aa5ab;--paper:#14181b;--card:#1b2125;--line:#2f373c;--ours:#3fc1b5;
--theirs:#59666e;--warn:#ff8a80}}
*{box-sizing:border-box}body{margin:0 auto;padding:40px 24px 80px;max-width:1020px;background:var(--paper);color:var(--ink);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:27px;line-height:1.25;margin:0 0 6px;letter-spacing:-.01em}h2{font-size:18px;margin:40px 0 10px}p{margin:8px 0}
.lead,figcaption{color:var(--soft)}figcaption{font-size:13px}code{font:13px ui-monospace,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere}
figure,.scroll{margin:12px 0;padding:14px 16px;background:var(--card);border:1px solid var(--line);border-radius:10px;overflow-x:auto}
.warning{border-left:4px solid var(--warn);padding:8px 14px;background:var(--card);border-radius:4px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:600;text-align:right;color:var(--soft);vertical-align:bottom}td{text-align:right;white-space:nowrap}td.text{white-space:normal}
th,td{padding:6px 10px;border-bottom:1px solid var(--line)}th:first-child,td:first-child,td.text,th.text{text-align:left}
tr:last-child td{border-bottom:0}tr.ours td{font-weight:600}tr.none td{color:var(--soft)}tr.bad td{color:var(--warn)}
svg{width:100%;height:auto;display:block;min-width:560px}svg text{font:12.5px system-ui,"DejaVu Sans",sans-serif;fill:var(--ink)}
svg .value,svg .tick,svg .axis{fill:var(--soft)}svg .ours-name{font-weight:700}.ours{fill:var(--ours)}.theirs{fill:var(--theirs)}
.whisker{stroke:var(--ink);stroke-width:1.4;fill:none}.bound{stroke:var(--warn);stroke-width:2;stroke-dasharray:3 2}
.grid{stroke:var(--line);fill:none}.line{fill:none;stroke-width:2}.ours-line .line{stroke-width:3.5}
"""


def render_html(results: Results, folder: Path, others: Sequence[Results] = ()) -> str:
    """folder: where traces.jsonl.gz lies, for the latency distribution; without it that plot is left out."""
    meta = results.meta
    body = [f"<h1>{escape(markdown.title(results))}</h1>", f'<p class="lead">{escape(_lead(meta))}</p>']
    body += [f'<p class="warning">{escape(w)}</p>' for w in meta.get("warnings", [])]
    body += ["<h2>Speed and quality</h2>", _note(markdown.FRONT_NOTE), _table(tables.front_grid(results))]
    body += ["<h2>Against the best peer</h2>", _note(markdown.BEST_NOTE), _table(tables.best_peer_grid(results), left=(1, 3, 5))]
    body += _plots(results, folder)
    for table in tables.case_tables(results):
        if not table.key.startswith("gate/"):
            body += [f"<h2>{escape(table.title)}</h2>", _bars(results, table), _case_rows(table)]
    if failed := tables.failures(results):
        body.append("<h2>What did not run, and why</h2><ul>")
        body += [f"<li><b>{escape(label)}</b> {escape(case)}: {escape(reason)}</li>" for label, case, reason in failed]
        body.append("</ul>")
    if others:
        body += ["<h2>Runs side by side</h2>", _table(tables.merged_grid([results, *others]), left=(1,))]
        for run in others:
            name = escape(markdown.title(run))
            body += [f"<h2>Against the best peer: {name}</h2>", _table(tables.best_peer_grid(run), left=(1, 3, 5))]
    body += ["<h2>How it was measured</h2><ul>", *[f"<li>{_inline(x[2:])}</li>" for x in markdown.method(results).splitlines()], "</ul>"]
    body += ["<h2>Contenders</h2>", _table(tables.contenders_grid(results), left=(1, 2, 3, 6))]
    colours = "".join(f".series-{i} circle{{fill:{c}}}.series-{i} .line{{stroke:{c}}}" for i, c in enumerate(_COLOURS))
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    name = escape(markdown.title(results))
    head += f"<title>{name}</title><style>{_STYLE}{colours}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def _lead(meta: dict[str, Any]) -> str:
    threads = len(meta["cpus"])
    return (
        f"{meta['device'].upper()}, {threads} thread{'s' if threads != 1 else ''}, up to {meta['options']['repeats']} interleaved repeats; "
        f"medians with 95% intervals. Weights {meta['model']['hash']}, the same for every engine."
    )


def _plots(results: Results, folder: Path) -> list[str]:
    """The three plots that look across cases, each only where the run has what it needs."""
    parts = []
    if sweep := _concurrency(results):
        plot = svg.lines(sweep, "sequences at once", "decode tokens/s", log_x=True)
        parts += ["<h2>Throughput against concurrency</h2>", _figure(plot, "Decode only, 128 tokens of prompt; medians.")]
    if gaps := _latency_distribution(results, folder):
        plot = svg.lines(gaps, "milliseconds between tokens", "share of gaps below", log_x=True, steps=True)
        parts += [
            "<h2>Latency distribution</h2>",
            _figure(plot, "Every gap between neighbouring tokens of the latency workload, all repeats."),
        ]
    dots, what = _quality_speed(results)
    if dots:
        plot = svg.scatter(dots, "decode tokens/s, batch 1", what)
        parts += [
            "<h2>Quality against speed</h2>",
            _figure(plot, "Right is faster. Perplexity and KL: lower is better; agreement: higher is better."),
        ]
    return parts


def _bars(results: Results, table: tables.CaseTable) -> str:
    items = []
    for row in table.rows:
        if row.spread is None:
            continue
        s = row.spread
        cells = [c for c in results.cells_of(row.label, table.key) if c.bound is not None]
        note = f"· {row.share:.0%} of roofline" if row.share is not None else ""
        items.append(svg.Bar(row.label, s.median, s.low, s.high, note, cells[0].bound if cells else None, row.label.startswith("minfer")))
    unit = tables.UNITS.get(table.metric, (table.metric, ""))[1]
    better = "longer" if table.higher_is_better else "shorter"
    caption = f"{unit or tables.UNITS.get(table.metric, (table.metric, ''))[0]}; {better} is better; whiskers: 95% interval of the median."
    return _figure(svg.bars(items, unit), caption) if items else ""


def _case_rows(table: tables.CaseTable) -> str:
    names = ("engine / weights", "median", "95%", "n", "of roofline", "minfer against it")
    head = "<tr>" + "".join(f"<th>{n}</th>" for n in names) + "<th class=text>note</th></tr>"
    lines = []
    for row in table.rows:
        kind = "none" if row.spread is None else "bad" if row.flagged else "ours" if row.label.startswith("minfer") else ""
        cells = [""] * 5
        if row.spread:
            s = row.spread
            interval = f"{tables.number(s.low)}–{tables.number(s.high)}" if s.n > 1 else ""
            share = f"{row.share:.0%}" if row.share is not None else ""
            cells = [tables.number(s.median), interval, str(s.n), share, tables.ratio_text(row.ratio, row.partner)]
        columns = "".join(f"<td>{escape(c)}</td>" for c in [row.label, *cells])
        lines.append(f'<tr class="{kind}">{columns}<td class=text>{escape(row.note)}</td></tr>')
    return f'<div class="scroll"><table>{head}{"".join(lines)}</table></div>'


def _concurrency(results: Results) -> list[svg.Line]:
    keys = [k for k in results.cases() if k.startswith("decode-sweep/")]
    found = []
    for colour, label in enumerate(results.contenders):
        points = [(float(k.split()[-1]), v) for k in keys if (v := tables.figure(results, label, k)) is not None]
        if len(points) > 1:
            found.append(svg.Line(label, sorted(points), colour, label.startswith("minfer")))
    return found


def _latency_distribution(results: Results, folder: Path) -> list[svg.Line]:
    gaps: dict[str, list[float]] = {}
    file = folder / "traces.jsonl.gz"
    if not file.exists():
        return []
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        for line in stream:
            record = json.loads(line)
            if record["case"].startswith("latency/") and record["engine"] in results.contenders:
                for trace in record["traces"]:
                    gaps.setdefault(record["engine"], []).extend(us / 1000 for us in trace["us"][1:])
    shares = [*range(0, 100, 2), 99]
    order = list(results.contenders)
    return [
        svg.Line(label, [(max(percentile(v, q), 1e-3), q / 100) for q in shares], order.index(label), label.startswith("minfer"))
        for label, v in gaps.items()
        if len(v) > 1
    ]


def _quality_speed(results: Results) -> tuple[list[tuple[str, float, float, int]], str]:
    """The best measure of quality that the run has: perplexity, then KL, then agreement."""
    speed = next((k for k in ("latency/batch 1", "decode-sweep/batch 1") if k in results.cases()), None)
    for key, name in (("quality/perplexity", "perplexity"), ("quality/next token", "KL to fp32"), ("quality/agreement", "agreement")):
        dots = []
        for colour, label in enumerate(results.contenders):
            x = tables.figure(results, label, speed) if speed else None
            y = tables.figure(results, label, key)
            if x is not None and y is not None:
                dots.append((label, x, y, colour))
        if len(dots) > 1:
            return dots, name
    return [], ""


def _table(grid: tables.Grid, left: Sequence[int] = ()) -> str:
    """left: columns of words, set flush left."""
    head, lines = grid

    def row(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if i in left else ''}>{escape(c).replace(chr(10), '<br>')}</{tag}>" for i, c in enumerate(cells)
        )

    body = "".join(f"<tr{' class=ours' if line[0].startswith('minfer') else ''}>{row(line, 'td')}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{row(head, "th")}</tr>{body}</table></div>'


def _note(text: str) -> str:
    return f'<p class="lead">{escape(text)}</p>'


def _figure(plot: str, caption: str) -> str:
    return f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _inline(text: str) -> str:
    """Markdown's `code` and *emphasis*, nothing else."""
    out = []
    for index, part in enumerate(escape(text).split("`")):
        out.append(f"<code>{part}</code>" if index % 2 else part)
    return "".join(out)
