"""The rows that every form of the report shows, computed once: medians, spreads, ratios to minfer, shares of the roofline.

A ratio always sets like beside like: a peer stands against minfer at the same precision, or where minfer has no such row,
against the one nearest in bits. minfer's own rows get no verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compare.machine import BUSY
from compare.measure import PairedRatio, Spread, paired_ratio
from compare.quality import GARBAGE_AGREEMENT, GARBAGE_PERPLEXITY
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
    """One contender's line in one case's table. `spread` is None where it has no figure; `note` says why, or warns.

    ratio: of minfer's row `partner` to this one.
    """

    label: str
    spread: Spread | None
    ratio: PairedRatio | None
    partner: str
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


def bits(precision: str) -> int:
    """Width of a weight, by which precisions are told to be alike."""
    known = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8}
    return known.get(precision) or next((int(c) for c in precision if c.isdigit()), 16)


def partner_of(results: Results, contender: Contender, key: str) -> str | None:
    """minfer's row that a peer is set against in a case: the same precision, else the nearest width; None for minfer itself."""
    if contender.name == "minfer":
        return None
    ours = [c for c in results.contenders.values() if c.name == "minfer" and results.values(c.label, key)]
    ours.sort(key=lambda c: (c.precision != contender.precision, abs(bits(c.precision) - bits(contender.precision))))
    return ours[0].label if ours else None


def case_tables(results: Results) -> list[CaseTable]:
    return [case_table(results, key) for key in results.cases()]


def case_table(results: Results, key: str) -> CaseTable:
    """Best first; contenders without a figure last."""
    first = next(c for c in results.cells if c.case == key)
    most = max((len(results.values(label, key)) for label in results.contenders), default=0)
    rows = [_row(results, contender, key, most) for contender in results.contenders.values() if contender.state == "ok"]
    sign = -1.0 if first.higher_is_better else 1.0
    rows.sort(key=lambda r: (r.spread is None, sign * r.spread.median if r.spread else 0.0))
    return CaseTable(key, first.metric, first.higher_is_better, rows)


def _row(results: Results, contender: Contender, key: str, most: int) -> Row:
    """most: repeats that the best-off contender has."""
    label = contender.label
    cells = results.cells_of(label, key)
    values = results.values(label, key)
    if not values:
        return Row(label, None, None, "", None, next((c.reason for c in cells if c.reason), "not run"), False)
    first = next(c for c in cells if c.status == "ok")
    scale = _SCALE.get(first.metric, 1.0)
    spread = Spread.of([v * scale for v in values.values()])
    partner = partner_of(results, contender, key)
    ratio = paired_ratio(results.values(partner, key), values, higher_is_better=first.higher_is_better) if partner else None
    share = share_of_roofline(results, label, key)
    notes = []
    flagged = is_garbage(results, label) and not key.startswith(("quality", "gate"))
    if flagged:
        notes.append("its output is garbage: the speed means nothing")
    if share is not None and share > 1.0:
        notes.append("more than the machine can do: something was measured wrong")
    if len(values) < most:
        cost = max(c.seconds for c in cells)
        notes.append(f"{len(values)} of {most} repeats" + (f": one took {cost:.0f} s" if cost else ""))
    if any(c.busy is not None and c.busy > BUSY for c in cells):
        notes.append("machine busy during some repeats")
    return Row(label, spread, ratio, partner or "", share, "; ".join(notes), flagged)


def share_of_roofline(results: Results, label: str, key: str) -> float | None:
    """Median figure over what the machine allows; None where no bound is known."""
    bound = next((c.bound for c in results.cells_of(label, key) if c.status == "ok" and c.bound), None)
    value = figure(results, label, key)
    return value / bound if bound and value is not None else None


def agreement_of(results: Results, label: str) -> float | None:
    """Greedy agreement with fp32 transformers, from `quality` or else from the short check before every run."""
    for key in ("quality/agreement", "gate/agreement"):
        if values := results.values(label, key):
            return next(iter(values.values()))
    return None


def is_garbage(results: Results, label: str) -> bool:
    """Whether its answers are too wrong for its speed to mean anything: by perplexity if it has one, else by agreement."""
    perplexity = figure(results, label, "quality/perplexity")
    if perplexity is not None:
        known = [figure(results, other, "quality/perplexity") for other in results.contenders]
        return perplexity > GARBAGE_PERPLEXITY * min(value for value in known if value is not None)
    agreement = agreement_of(results, label)
    return agreement is not None and agreement < GARBAGE_AGREEMENT


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


def ratio_text(ratio: PairedRatio | None, partner: str = "") -> str:
    """`int4 2.15× [2.10–2.20] faster`: the precision is that of minfer's row."""
    if ratio is None:
        return ""
    s, whose = ratio.spread, partner.partition("/")[2]
    if s.n < 3:  # too few for a verdict
        return f"{whose} {s.median:.2f}× ({'one pair' if s.n == 1 else 'two pairs'})".strip()
    return f"{whose} {s.median:.2f}× [{s.low:.2f}–{s.high:.2f}] {ratio.verdict}".strip()


def share_text(value: float | None, share: float | None) -> str:
    """A figure with its share of the roofline."""
    if value is None:
        return "–"
    return number(value) + (f" ({share:.0%})" if share is not None else "")


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


_FRONT = (  # the columns of the table that comes first: speed and what it cost in quality
    ("latency/batch 1", "decode\ntokens/s"),
    ("prefill/512 in", "prefill 512\ntokens/s"),
    ("throughput/offline", "64 requests\noutput tokens/s"),
    ("decode-sweep/batch 8", "decode × 8\ntokens/s"),
    ("decode-sweep/batch 32", "decode × 32\ntokens/s"),
    ("quality/perplexity", "perplexity"),
    ("quality/agreement", "agreement"),
    ("quality/next token", "KL to fp32"),
)


def front_grid(results: Results) -> Grid:
    """Speed beside quality, narrowest weights first: of the cases above, those that the run has. In brackets: of the roofline."""
    columns = [(key, name) for key, name in _FRONT if key in results.cases()]
    if not any(key == "quality/agreement" for key, _ in columns) and "gate/agreement" in results.cases():
        columns.append(("gate/agreement", "agreement"))
    head = ["engine / weights", "weights\nMB", *[name for _, name in columns]]
    able = [c for c in results.contenders.values() if c.state == "ok"]
    lines = []
    for contender in sorted(able, key=lambda c: (bits(c.precision), c.name != "minfer")):
        cells = []
        for key, _ in columns:
            value = figure(results, contender.label, key)
            if key.endswith("/agreement"):
                cells.append(f"{value:.0%}" if value is not None else "–")
            else:
                star = "*" if value is not None and not key.startswith("quality/") and is_garbage(results, contender.label) else ""
                cells.append(share_text(value, share_of_roofline(results, contender.label, key)) + star)
        lines.append([contender.label, f"{contender.weight_bytes / 1e6:.0f}", *cells])
    return head, lines


def best_peer(results: Results, key: str, width: int | None = None) -> str | None:
    """The peer with the best figure of a case, of weights as wide as `width` bits if given; garbage can't win."""
    higher = next(c.higher_is_better for c in results.cells if c.case == key)
    found = {
        c.label: value
        for c in results.contenders.values()
        if c.name != "minfer" and width in (None, bits(c.precision)) and not is_garbage(results, c.label)
        if (value := figure(results, c.label, key)) is not None
    }
    return (max if higher else min)(found, key=found.__getitem__) if found else None


def best_peer_grid(results: Results) -> Grid:
    """Every speed case and every row of minfer against the best peer of the same width, and the best of all."""
    head = ["case", "minfer", "figure\n(of roofline)", "best peer, same width", "ratio", "best peer of all", "ratio"]
    lines = []
    for key in results.cases():
        if key.startswith(("gate/", "quality/")):
            continue
        higher = next(c.higher_is_better for c in results.cells if c.case == key)
        for ours in results.contenders.values():
            values = results.values(ours.label, key)
            if ours.name != "minfer" or not values:
                continue
            line = [key, ours.precision, share_text(scaled(results, ours.label, key), share_of_roofline(results, ours.label, key))]
            for peer in (best_peer(results, key, bits(ours.precision)), best_peer(results, key)):
                if peer is None:
                    line += ["–", ""]
                    continue
                ratio = paired_ratio(values, results.values(peer, key), higher_is_better=higher)
                line += [f"{peer} {share_text(scaled(results, peer, key), share_of_roofline(results, peer, key))}", ratio_text(ratio)]
            lines.append(line)
    return head, lines


def scaled(results: Results, label: str, key: str) -> float | None:
    """A case's median in the unit that the tables show."""
    value = figure(results, label, key)
    metric = next(c.metric for c in results.cells if c.case == key)
    return None if value is None else value * _SCALE.get(metric, 1.0)


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
