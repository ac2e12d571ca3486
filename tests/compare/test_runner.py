"""The order of cells, the isolation of failures, and that nothing finished is run twice."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compare.budget import Budget
from compare.fleet import Fleet, Launch
from compare.process import EngineProcess
from compare.protocol import Request, Trace
from compare.results import Contender, Store, read_results
from compare.runner import Entry, Runner, Settings, warm_up
from compare.weights import Weights
from compare.workloads import Case

CONFIG = {
    "vocab_size": 100,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
CASES = [
    Case("latency", "one", "decode_tokens_per_s", (Request([1] * 8, 6),)),
    Case("throughput", "two", "output_tokens_per_s", (Request([1] * 8, 3), Request([1], 3)), concurrency=2),
]


def entry(label: str, tmp_path: Path) -> Entry:
    launch = Launch(label, "tests.compare.fake_engine", Path(sys.executable), tmp_path, tmp_path / f"{label}.log", (), 0)
    return Entry(launch, "bf16", prefix_caching=False)


def runner(tmp_path: Path, labels: list[str], cases: list[Case] = CASES, repeats: int = 3, limit: float = 30) -> tuple[Runner, Store]:
    store = Store.create(tmp_path / "results", {"warnings": []})
    for label in labels:
        store.results.contenders[label] = Contender(label, label, "bf16", "", "", "continuous")
    weights = Weights("w", tmp_path, False, CONFIG, "hash")
    ceilings = {"read_bytes_per_s": 1e9, "fp32_ops_per_s": 1e9, "bf16_ops_per_s": 2e9}
    settings = Settings("cpu", 1, repeats, limit, ceilings)
    return Runner([entry(label, tmp_path) for label in labels], cases, weights, settings, store, None), store


def test_engines_take_turns_forwards_and_backwards(tmp_path: Path) -> None:
    order = [(e.launch.label, c.name, r) for e, c, r in runner(tmp_path, ["a", "b"], repeats=2)[0].cells()]
    turns = [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert order == [(label, case, repeat) for case in ("one", "two") for label, repeat in turns]


def test_a_run_fills_every_cell_with_figures_and_a_bound(tmp_path: Path) -> None:
    run, store = runner(tmp_path, ["a"])
    run.run()
    saved = read_results(tmp_path / "results")
    assert [c.status for c in saved.cells] == ["ok"] * 6
    assert len(saved.values("a", "latency/one")) == 3
    assert all(c.bound and c.busy is not None and c.seconds > 0 for c in saved.cells)
    assert saved.contenders["a"].version == "1"
    assert (tmp_path / "results" / "traces.jsonl.gz").exists()
    assert store.done("a", "latency/one", 2)


def test_a_slow_engine_stops_repeating_and_the_others_go_on(tmp_path: Path) -> None:
    run, store = runner(tmp_path, ["slow", "quick"], CASES[:1], repeats=3)
    run.settings.budget = Budget(case_s=60)
    run._measure = lambda fleet, entry, case: ({"decode_tokens_per_s": 1.0}, [], 50.0 if entry.launch.label == "slow" else 20.0)  # type: ignore[method-assign]
    run.run()
    assert {label: len(store.results.values(label, "latency/one")) for label in ("slow", "quick")} == {"slow": 1, "quick": 3}


def test_a_round_that_no_longer_fits_is_begun_for_nobody_and_noted(tmp_path: Path) -> None:
    run, store = runner(tmp_path, ["a", "b"], repeats=3)
    run.settings.budget = Budget(total_s=0.001)
    run.run()
    assert {(c.engine, c.repeat) for c in store.results.cells} == {("a", 0), ("b", 0)}
    assert store.results.meta["notes"] == [f"{w}: the time budget allowed 1 of 3 repeats" for w in ("latency", "throughput")]


def test_a_failing_engine_costs_its_own_cells_and_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "crash")
    run, store = runner(tmp_path, ["bad"])
    asked: list[tuple[str, str, int]] = []
    run.progress = lambda *cell: asked.append(cell)
    run.run()
    assert {c.status for c in store.results.cells} == {"failed"}
    assert all("SIGKILL" in c.reason for c in store.results.cells)
    assert len(asked) == 6

    monkeypatch.setenv("FAKE", "good")
    again, _ = runner(tmp_path, ["bad", "good"])
    again.store = store
    store.results.contenders["good"] = Contender("good", "good", "bf16", "", "", "")
    again.run()  # failed cells are tried again, and the neighbour's are all there
    assert {c.status for c in store.results.cells} == {"ok"}


def test_a_hanging_engine_is_ended_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "hang")
    run, store = runner(tmp_path, ["slow"], CASES[:1], limit=1.0)
    run.run()
    assert [c.reason[:7] for c in store.results.cells] == ["timeout"] * 3


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    run, store = runner(tmp_path, ["a"], repeats=2)
    run.run()
    before = [c.at for c in store.results.cells]
    again, _ = runner(tmp_path, ["a"], repeats=3)
    again.store = Store.open(tmp_path / "results")
    asked: list[int] = []
    again.progress = lambda label, case, repeat: asked.append(repeat)
    again.run()
    assert asked == [2, 2]
    assert [c.at for c in again.store.results.cells if c.repeat < 2] == before


def test_ctrl_c_keeps_what_was_done_and_ends_the_engines(tmp_path: Path) -> None:
    run, _ = runner(tmp_path, ["a"])
    seen = 0

    def interrupt(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt

    run.progress = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert len(read_results(tmp_path / "results").cells) == 2


def test_an_engine_without_a_prefix_cache_is_left_out_of_that_workload(tmp_path: Path) -> None:
    case = Case("shared-prefix", "questions", "ttft_p50_s", CASES[0].requests, prefix_caching=True)
    run, store = runner(tmp_path, ["a"], [case])
    run.run()
    assert {c.status for c in store.results.cells} == {"unsupported"}


def test_load_time_and_memory_come_from_a_fresh_process(tmp_path: Path) -> None:
    cases = [
        Case("load-time", "to first token", "load_s", CASES[0].requests, kind="load"),
        Case("memory", "batch 1", "peak_resident_bytes", CASES[0].requests, kind="memory", repeats=1),
    ]
    run, store = runner(tmp_path, ["a"], cases, repeats=2)
    run.run()
    assert all(v > 0 for v in store.results.values("a", "load-time/to first token").values())
    assert store.results.values("a", "memory/batch 1")[0] > 1e6


def test_warm_up_is_a_short_form_that_never_waits() -> None:
    case = Case("serving", "x", "goodput_per_s", tuple(Request([1] * 4, 50, arrival=9.0) for _ in range(40)))
    short = warm_up(case)
    assert len(short) == 8
    assert all(r.max_tokens == 8 and r.arrival == 0 for r in short)


def test_the_fleet_reloads_only_when_options_change(tmp_path: Path) -> None:
    run, _ = runner(tmp_path, ["a"])
    launch = run.entries[0].launch
    one, other = run._options(run.entries[0], CASES[0]), run._options(run.entries[0], CASES[1])
    with Fleet(30) as fleet:
        first, new = fleet.use(launch, one, lambda _: None)
        assert new
        assert fleet.use(launch, one, lambda _: None) == (first, False)
        second, new = fleet.use(launch, other, lambda _: None)
        assert new
        assert second is not first
        assert not first.alive
    assert not second.alive


def test_an_engine_that_was_loaded_again_is_warmed_up_again(tmp_path: Path) -> None:
    run, _ = runner(tmp_path, ["a"], CASES[:1], repeats=2)
    run.progress = lambda label, case, repeat: asked.append("next")
    asked: list[str] = []
    timed = run._timed

    def spy(process: EngineProcess, entry: Entry, case: Case) -> list[Trace]:
        asked.append("cold" if (entry.launch.label, case.key) not in run._warm else "warm")
        traces = timed(process, entry, case)
        process.kill()  # the fleet will have to load it again
        return traces

    run._timed = spy  # type: ignore[method-assign]
    run.run()
    assert asked == ["next", "cold", "next", "cold"]
