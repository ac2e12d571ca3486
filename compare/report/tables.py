"""The rows that every form of the report shows, computed once: medians, spreads, ratios to minfer, shares of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compare.machine import BUSY
from compare.measure import PairedRatio, Spread, paired_ratio
from compare.quality import GARBAGE
from compare.results import Contender, Results

UNITS = {
    "decode_tokens_per_s": ("decode", "tokens/s"),
    "prefill_tokens_per_s": ("prefill", "tokens/s"),
    "output_tokens_per_s": ("output", "tokens/s"),
    "goodput_per_s": ("goodput", "requests/s"),
    "ttft_p50_s": ("time to first token", "s"),
    "load_s": ("load", "s"),
    "peak_resident_bytes": ("peak memory", "MB"),
    "agreement": ("agreement", "%"),
    "kl": ("KL", "nats"),
    "perplexity": ("perplexity", ""),
}
Grid = tuple[list[str], list[list[str]]]  # head, lines
_SCALE = {"peak_resident_bytes": 1e-6, "agreement": 100.0}


@dataclass(frozen=True)
class Row:
    """One contender's line in one case's table. `spread` is None where it has no figure; `note` says why, or warns."""

    label: str
    spread: Spread | None
    ratio: PairedRatio | None
    share: float | None
    note: str
    flagged: bool


@dataclass(frozen=True)
class CaseTable:
    key: str
    metric: str
    higher_is_better: bool
    rows: list[Row]

    @property
    def title(self) -> str:
        name, unit = UNITS.get(self.metric, (self.metric, ""))
        return f"{self.key}: {name}{f' ({unit})' if unit else ''}"


def minfer_label(results: Results) -> str | None:
    """The minfer row that ratios refer to: the first one that ran."""
    return next((c.label for c in results.contenders.values() if c.name == "minfer" and c.state == "ok"), None)


def case_tables(results: Results) -> list[CaseTable]:
    return [case_table(results, key) for key in results.cases()]


def case_table(results: Results, key: str) -> CaseTable:
    """Best first; contenders without a figure last."""
    first = next(c for c in results.cells if c.case == key)
    base = minfer_label(results)
    ours = results.values(base, key) if base else {}
    rows = [_row(results, contender, key, base, ours) for contender in results.contenders.values() if contender.state == "ok"]
    sign = -1.0 if first.higher_is_better else 1.0
    rows.sort(key=lambda r: (r.spread is None, sign * r.spread.median if r.spread else 0.0))
    return CaseTable(key, first.metric, first.higher_is_better, rows)


def _row(results: Results, contender: Contender, key: str, base: str | None, ours: dict[int, float]) -> Row:
    label = contender.label
    cells = results.cells_of(label, key)
    values = results.values(label, key)
    if not values:
        return Row(label, None, None, None, next((c.reason for c in cells if c.reason), "not run"), False)
    first = next(c for c in cells if c.status == "ok")
    scale = _SCALE.get(first.metric, 1.0)
    spread = Spread.of([v * scale for v in values.values()])
    ratio = paired_ratio(ours, values, higher_is_better=first.higher_is_better) if ours and label != base else None
    share = spread.median / first.bound if first.bound else None
    notes = []
    flagged = is_garbage(results, label) and not key.startswith(("quality", "gate"))
    if flagged:
        notes.append("its output is garbage: the speed means nothing")
    if share is not None and share > 1.0:
        notes.append("more than the machine can do: something was measured wrong")
    if any(c.busy is not None and c.busy > BUSY for c in cells):
        notes.append("machine busy during some repeats")
    return Row(label, spread, ratio, share, "; ".join(notes), flagged)


def agreement_of(results: Results, label: str) -> float | None:
    """Greedy agreement with fp32 transformers, from `quality` or else from the short check before every run."""
    for key in ("quality/agreement", "gate/agreement"):
        if values := results.values(label, key):
            return next(iter(values.values()))
    return None


def is_garbage(results: Results, label: str) -> bool:
    agreement = agreement_of(results, label)
    return agreement is not None and agreement < GARBAGE


def figure(results: Results, label: str, key: str) -> float | None:
    values = results.values(label, key)
    return Spread.of(list(values.values())).median if values else None


def failures(results: Results) -> list[tuple[str, str, str]]:
    """(contender, case, reason), one line for all repeats; contenders that never started first."""
    lines = [(c.label, "", c.state) for c in results.contenders.values() if c.state != "ok"]
    seen = {(c.engine, c.case): c.reason for c in results.cells if c.status != "ok"}
    return lines + [(engine, case, reason) for (engine, case), reason in seen.items()]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3 if abs(value) >= 0.1 else 4
    return f"{value:,.{digits}f}"


def spread_text(spread: Spread) -> str:
    return number(spread.median) if spread.n < 2 else f"{number(spread.median)} [{number(spread.low)}–{number(spread.high)}]"


def ratio_text(ratio: PairedRatio | None) -> str:
    if ratio is None:
        return ""
    s = ratio.spread
    return f"{s.median:.2f}× [{s.low:.2f}–{s.high:.2f}] {ratio.verdict}" if s.n > 1 else f"{s.median:.2f}×"


def summary_grid(results: Results) -> Grid:
    """One line a contender, one column a case. Medians; a star marks a speed whose output is garbage."""
    cases = [key for key in results.cases() if not key.startswith(("gate/", "quality/agreement"))]
    computed = [case_table(results, case) for case in cases]
    head = ["engine / weights", "weights\nMB", *[f"{t.key}\n{_unit(t.metric)}" for t in computed], "agreement"]
    lines = []
    for contender in results.contenders.values():
        if contender.state != "ok":
            continue
        cells = []
        for table in computed:
            row = next(r for r in table.rows if r.label == contender.label)
            cells.append(f"{number(row.spread.median)}{'*' if row.flagged else ''}" if row.spread else "–")
        agreement = agreement_of(results, contender.label)
        lines.append([contender.label, f"{contender.weight_bytes / 1e6:.0f}", *cells, f"{agreement:.0%}" if agreement is not None else "–"])
    return head, lines


def contenders_grid(results: Results) -> Grid:
    """What every contender was: version, setting, flags."""
    head = ["engine / weights", "version", "setting", "flags", "weights\nMB", "load\ns", "batching"]
    lines = [
        [c.label, c.version, c.setting, c.flags[:160], f"{c.weight_bytes / 1e6:.0f}", f"{c.load_s:.1f}", c.batching]
        for c in results.contenders.values()
        if c.state == "ok"
    ]
    return head, lines


def merged_grid(runs: Sequence[Results]) -> Grid:
    """Every case and contender, one column a run: `report DIR DIR...`."""
    head = ["case", "engine / weights", *[f"{r.meta['machine'].get('host', '?')}\n{r.meta['started'][:16]}" for r in runs]]
    lines = []
    for case, label in dict.fromkeys((case, label) for run in runs for case in run.cases() for label in run.contenders):
        found = [list(run.values(label, case).values()) for run in runs]
        if any(found):
            lines.append([case, label, *[spread_text(Spread.of(v)) if v else "–" for v in found]])
    return head, lines


def _unit(metric: str) -> str:
    name, unit = UNITS.get(metric, (metric, ""))
    return f"{name}, {unit}" if unit else name
