"""Reports of a made-up run whose every cell is known: what is flagged, ranked, left out; and that the HTML stands alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from compare.errors import CompareError
from compare.protocol import Trace
from compare.report import tables, write_reports
from compare.report.markdown import readme_block, render_markdown, replace_block
from compare.results import Cell, Contender, Results, Store, read_results

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "br", "path", "rect", "circle"}


def meta() -> dict[str, Any]:
    return {
        "command": "python -m compare --against a",
        "started": "2026-01-02 03:04:05",
        "machine": {"host": "h", "cpu": "A <fast> CPU"},
        "device": "cpu",
        "cpus": [0, 1],
        "ceilings": {"read_bytes_per_s": 5e10},
        "model": {"name": "m", "hash": "abc", "real": True, "config": {}},
        "options": {"repeats": 5},
        "warnings": ["the machine was busy"],
    }


def cells(engine: str, case: str, metric: str, values: list[float], **more: Any) -> list[Cell]:
    return [Cell(engine, case, i, "ok", metric, {metric: v}, **more) for i, v in enumerate(values)]


@pytest.fixture
def run() -> Results:
    results = Results(meta())
    for label in ("minfer/bf16", "fast/int4", "slow/bf16", "liar/int4", "absent/bf16"):
        name, precision = label.split("/")
        results.contenders[label] = Contender(label, name, precision, name, "as told", "static", weight_bytes=10**8)
    results.contenders["absent/bf16"].state = "pip | failed"
    speed = {"minfer/bf16": [100, 102, 101, 99, 100], "fast/int4": [200, 201, 199, 200, 202], "slow/bf16": [50, 51, 49, 50, 52]}
    for label, values in {**speed, "liar/int4": [900.0] * 5}.items():
        results.cells += cells(label, "latency/batch 1", "decode_tokens_per_s", [float(v) for v in values], bound=400.0)
    for label, share in (("minfer/bf16", 0.99), ("fast/int4", 0.4), ("slow/bf16", 0.95), ("liar/int4", 0.004)):
        results.cells += cells(label, "quality/agreement", "agreement", [share])
    results.cells.append(Cell("slow/bf16", "throughput/offline", 0, "failed", "output_tokens_per_s", reason="crash: died"))
    results.cells += cells("minfer/bf16", "throughput/offline", "output_tokens_per_s", [300.0])
    for batch in (1, 4):
        results.cells += cells("minfer/bf16", f"decode-sweep/batch {batch}", "decode_tokens_per_s", [90.0 * batch])
    return results


def test_medians_ratios_and_verdicts(run: Results) -> None:
    table = tables.case_table(run, "latency/batch 1")
    assert [r.label for r in table.rows] == ["liar/int4", "fast/int4", "minfer/bf16", "slow/bf16"]
    rows = {r.label: r for r in table.rows}
    assert rows["minfer/bf16"].ratio is None
    against_fast, against_slow = rows["fast/int4"].ratio, rows["slow/bf16"].ratio
    assert against_fast is not None
    assert against_slow is not None
    assert (against_fast.verdict, against_slow.verdict) == ("slower", "faster")
    assert rows["fast/int4"].share == pytest.approx(0.5)


def test_a_peer_is_set_against_minfer_of_its_own_precision_and_minfer_against_nobody(run: Results) -> None:
    run.contenders["minfer/int4"] = Contender("minfer/int4", "minfer", "int4", "minfer", "", "")
    run.contenders["odd/fp8"] = Contender("odd/fp8", "odd", "fp8", "odd", "", "")
    run.cells += cells("minfer/int4", "latency/batch 1", "decode_tokens_per_s", [300.0] * 5, bound=800.0)
    run.cells += cells("odd/fp8", "latency/batch 1", "decode_tokens_per_s", [150.0] * 5)
    rows = {r.label: r for r in tables.case_table(run, "latency/batch 1").rows}
    assert {label: r.partner for label, r in rows.items()} == {
        "minfer/bf16": "",
        "minfer/int4": "",
        "fast/int4": "minfer/int4",
        "liar/int4": "minfer/int4",
        "slow/bf16": "minfer/bf16",
        "odd/fp8": "minfer/int4",  # 4 bits are nearer to 8 than 16 are
    }
    assert rows["fast/int4"].ratio is not None
    assert rows["fast/int4"].ratio.spread.median == 1.5
    assert tables.ratio_text(rows["fast/int4"].ratio, "minfer/int4").startswith("int4 1.50× [")


def test_the_best_peer_of_each_width_is_never_garbage(run: Results) -> None:
    _, lines = tables.best_peer_grid(run)
    found = {(line[0], line[1]): line[2:] for line in lines}
    figure, same, ratio, best, overall = found["latency/batch 1", "bf16"]
    assert figure == "100 (25%)"
    assert same.startswith("slow/bf16 50")
    assert ratio.startswith("2.00×")
    assert best.startswith("fast/int4 200")
    assert overall.startswith("0.50×")


def test_speed_stands_beside_quality(run: Results) -> None:
    head, lines = tables.front_grid(run)
    assert head == ["engine / weights", "weights\nMB", "decode\ntokens/s", "64 requests\noutput tokens/s", "agreement"]
    assert lines[0] == ["fast/int4", "100", "200 (50%)", "–", "40%"]
    assert [line[0] for line in lines] == ["fast/int4", "liar/int4", "minfer/bf16", "slow/bf16"]


def test_fewer_repeats_than_others_are_said_with_their_cost(run: Results) -> None:
    run.cells = [c for c in run.cells if not (c.engine == "slow/bf16" and c.case == "latency/batch 1" and c.repeat)]
    next(c for c in run.cells if c.engine == "slow/bf16" and c.case == "latency/batch 1").seconds = 160.0
    rows = {r.label: r for r in tables.case_table(run, "latency/batch 1").rows}
    assert rows["slow/bf16"].note == "1 of 5 repeats: one took 160 s"
    assert rows["fast/int4"].note == ""


def test_garbage_is_flagged_and_more_than_the_machine_can_do_too(run: Results) -> None:
    rows = {r.label: r for r in tables.case_table(run, "latency/batch 1").rows}
    assert rows["liar/int4"].flagged
    assert "garbage" in rows["liar/int4"].note
    assert "measured wrong" in rows["liar/int4"].note
    assert not rows["fast/int4"].flagged
    assert "900*" in render_markdown(run)


def test_perplexity_decides_what_is_garbage_where_it_is_known(run: Results) -> None:
    """Four bits alter nearly every greedy continuation of a small model; that alone isn't garbage. And agreeing at first isn't health."""
    for label, value in (("minfer/bf16", 20.0), ("liar/int4", 29.0), ("fast/int4", 31.0)):
        run.cells += cells(label, "quality/perplexity", "perplexity", [value])
    assert {label: tables.is_garbage(run, label) for label in ("minfer/bf16", "liar/int4", "fast/int4", "slow/bf16")} == {
        "minfer/bf16": False,
        "liar/int4": False,
        "fast/int4": True,
        "slow/bf16": False,
    }


def test_failures_stand_with_their_reasons(run: Results) -> None:
    text = render_markdown(run)
    assert "**absent/bf16**: pip | failed" in text
    assert "**slow/bf16** throughput/offline: crash: died" in text
    assert "> **Warning:** the machine was busy" in text


def test_the_readme_block_is_the_summary(run: Results) -> None:
    block = readme_block(run, "results/x")
    assert block.startswith("<!-- compare:begin -->")
    assert block.endswith("<!-- compare:end -->")
    assert "| minfer/bf16 | 100 | 100 (25%) | 300 | 99% |" in block
    assert "| latency/batch 1 | bf16 | 100 (25%) | slow/bf16 50.0 (12%) |" in block
    assert run.meta["command"] in block
    page = replace_block("a\n<!-- compare:begin -->old<!-- compare:end -->\nb", run, "results/x")
    assert page == f"a\n{block}\nb"
    assert replace_block(page, run, "results/x") == page
    with pytest.raises(CompareError, match="no block"):
        replace_block("nothing", run, "x")


class Balanced(HTMLParser):
    """Fails on a tag that is not closed, and gathers what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_html_is_one_balanced_file_that_fetches_nothing(run: Results, tmp_path: Path) -> None:
    store = Store(tmp_path, Results(meta(), run.contenders))
    store.put(run.cells[0], [Trace(0.0, 5, [1, 2, 3], [0.1, 0.12, 0.15])])
    write_reports(run, tmp_path, others=[run])
    page = (tmp_path / "report.html").read_text()
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert parser.fetched == []
    assert "<script" not in page
    assert "url(" not in page
    assert page.count("<svg") >= 5
    assert "A &lt;fast&gt; CPU" in page
    assert "prefers-color-scheme:dark" in page
    assert not re.search(r"(?<![\w-])(nan|inf)(?![\w-])", re.sub(r"<style>.*?</style>", "", page))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_the_page_and_nothing_sticks_out(run: Results, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    write_reports(run, tmp_path)
    page = tmp_path / "report.html"
    counts = "document.documentElement.scrollWidth, innerWidth, document.querySelectorAll('svg rect').length"
    probe = f"<script>document.title = [{counts}].join()</script>"
    page.write_text(page.read_text() + probe)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([CHROMIUM, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>([\d,]+)</title>", done.stdout)
    assert title, "the page was not drawn"
    wide, window, bars = map(int, title.group(1).split(","))
    assert wide <= window, "something is wider than the window"
    assert bars >= 5


def test_results_survive_a_round_trip_and_refuse_other_formats(run: Results, tmp_path: Path) -> None:
    Store(tmp_path, run).save()
    assert read_results(tmp_path).as_json() == run.as_json()
    file = tmp_path / "results.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(Exception, match="format 99"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (0.1234, "0.123"), (0.01234, "0.0123")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert tables.number(value) == text
