"""What a live view says is what the engine does, costs nothing unwatched, is bounded, and holds no text."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minfer.engine.live as live
from minfer import EngineConfig, SamplingParams
from minfer.engine.engine import Engine
from minfer.engine.live import CACHED, DECODE, FREE, PREFILL, RECOMPUTE, SHARED, USED, LiveView

BLOCK = 16
WORDS = "The quick brown fox jumps over the lazy dog. "
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
Make = Callable[..., Engine]


@pytest.fixture
def make(tiny_llama: Path) -> Make:
    def engine(**settings: Any) -> Engine:
        values = {"dtype": "float32", "device": "cpu", "threads": 1, "kv_cache_memory": 1 << 20, "graphs": False, **settings}
        return Engine.from_config(EngineConfig(model=str(tiny_llama), **values))

    return engine


def run(engine: Engine) -> None:
    while engine.has_unfinished_requests:
        engine.step()


def unfold(runs: list[int]) -> list[int]:
    return [value for value, count in zip(runs[::2], runs[1::2], strict=True) for _ in range(count)]


def table(runs: list[int]) -> list[int]:
    return [first + i for first, count in zip(runs[::2], runs[1::2], strict=True) for i in range(count)]


def test_blocks_and_requests_are_those_of_the_engine_at_every_step(make: Make) -> None:
    engine = make(max_num_batched_tokens=64)
    view = LiveView(engine)
    view.snapshot()
    engine.add_request("first", WORDS * 6, GREEDY)
    while not engine.core.scheduler.running or engine.core.scheduler.running[0].num_left > 1:
        engine.step()  # the beginning is in the cache now
    for n in range(4):
        engine.add_request(f"r{n}", WORDS * 6 + f"{n}" * 30, GREEDY)
    scheduler, kinds = engine.core.scheduler, Counter[int]()
    while engine.has_unfinished_requests:
        engine.step()
        seen = view.snapshot()
        states = unfold(seen["pool"]["map"])
        assert scheduler.prefix_cache is not None
        kept = {node.block for node in scheduler.prefix_cache.nodes()}
        expected = []
        for block in range(scheduler.pool.num_blocks):
            references = scheduler.pool.references(block)
            expected.append(min(USED + references - 1, SHARED) if references else CACHED if block in kept else FREE)
        assert states == expected
        assert seen["pool"]["used"] == states.count(USED) + states.count(SHARED) == scheduler.pool.num_used
        assert (seen["pool"]["shared"], seen["pool"]["cached"]) == (states.count(SHARED), states.count(CACHED))
        assert [table(request["table"]) for request in seen["running"]] == [request.blocks for request in scheduler.running]
        assert [request["id"] for request in seen["waiting"]] == [request.arrival for request in scheduler.first_waiting(64)]
        assert seen["num_running"] == len(scheduler.running)
        kinds.update(states)
    assert all(kinds[kind] for kind in (FREE, CACHED, USED, SHARED)), "the run should have shown every kind"
    counters = view.snapshot()["counters"]
    assert counters["prefix_hits"] == scheduler.stats.num_prefix_hits > 4 * BLOCK


def test_steps_add_up_to_the_engines_counters(make: Make) -> None:
    engine = make(max_num_batched_tokens=64)
    view = LiveView(engine)
    view.snapshot()
    for n in range(5):
        engine.add_request(str(n), f"{n} {WORDS * 3}", GREEDY)
    run(engine)
    seen = view.snapshot()
    steps, stats = seen["steps"], engine.core.scheduler.stats
    assert [step["step"] for step in steps] == list(range(1, stats.num_steps + 1))
    assert sum(step["tokens"] for step in steps) == stats.num_computed_tokens
    assert all(step["tokens"] == sum(row[3] for row in step["rows"]) <= 64 for step in steps)
    assert sum(step["said"] for step in steps) == 5 * 8
    assert {row[1] for step in steps for row in step["rows"]} == {PREFILL, DECODE}
    for request in range(5):
        rows = [row for step in steps for row in step["rows"] if row[0] == request]
        assert all(a[2] + a[3] == b[2] for a, b in itertools.pairwise(rows)), "each row begins where the one before ended"
        assert [row[3] for row in rows if row[1] == DECODE] == [1] * 7, "the first token comes with the prompt's last chunk"
    assert all(len(step["us"]) == 6 and min(step["us"]) >= 0 for step in steps)
    ends = seen["ended"]
    assert [(end["id"], end["output"], end["reason"]) for end in ends] == [(n, 8, "length") for n in range(5)]
    assert all(0 <= end["queue_us"] <= end["first_token_us"] <= end["total_us"] for end in ends)


def test_recomputed_tokens_and_right_guesses_are_told_apart(make: Make) -> None:
    engine = make(kv_cache_memory=96 << 10, max_model_len=64, prefix_caching=False)
    view = LiveView(engine)
    view.snapshot()
    for n in range(12):
        engine.add_request(str(n), f"{n}", SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    run(engine)
    seen = view.snapshot()
    assert seen["counters"]["preemptions"] == sum(len(step["preempted"]) for step in seen["steps"]) > 0
    assert any(row[1] == RECOMPUTE for step in seen["steps"] for row in step["rows"])

    engine = make(speculative="ngram", adaptive_drafts=False, ngram_min_match=1)
    view = LiveView(engine)
    view.snapshot()
    engine.add_request("a", WORDS * 8, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    run(engine)
    seen = view.snapshot()
    rows = [row for step in seen["steps"] for row in step["rows"]]
    assert sum(row[4] for row in rows) == seen["counters"]["draft_tokens"] > 0
    assert all(row[1] == DECODE and row[3] == 1 + row[4] >= 1 + row[5] for row in rows if row[4])


def test_nobody_looking_costs_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    view = LiveView(engine)
    before = len(engine.watchers)
    view.snapshot()
    assert len(engine.watchers) == before + 1
    assert view.watching
    monkeypatch.setattr(live, "WATCHED_SECONDS", -1.0)
    engine.add_request("a", "x", GREEDY)
    run(engine)
    assert len(engine.watchers) == before
    assert not view.watching
    monkeypatch.undo()
    seen = view.snapshot()
    assert seen["steps"] == [], "what was recorded before would leave a gap"
    assert view.watching, "looking again is all it takes"


def test_a_snapshot_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MAX_STEPS": 4,
        "MAX_ROWS": 3,
        "MAX_RUNNING": 5,
        "MAX_WAITING": 2,
        "MAX_LISTED_BLOCKS": 10,
        "MAX_CELLS": 100,
    }.items():
        monkeypatch.setattr(live, name, value)
    engine = make(max_num_seqs=8)
    view = LiveView(engine)
    view.snapshot()
    for n in range(20):
        engine.add_request(str(n), f"{n} " + WORDS * 4, GREEDY)
    for _ in range(6):
        engine.step()
    seen = view.snapshot()
    assert [step["step"] for step in seen["steps"]] == [3, 4, 5, 6]
    assert {(step["num_rows"], len(step["rows"])) for step in seen["steps"]} == {(8, 3)}
    assert (seen["num_running"], len(seen["running"])) == (8, 5)
    assert (seen["num_waiting"], len(seen["waiting"])) == (12, 2)
    assert all(sum(request["table"][1::2]) == 2 < request["blocks"] for request in seen["running"])
    pool = seen["pool"]
    states = unfold(pool["map"])
    assert pool["per_cell"] * 100 >= pool["blocks"] > 100 >= len(states)
    used = {block // pool["per_cell"] for request in engine.core.scheduler.running for block in request.blocks}
    assert {cell for cell, kind in enumerate(states) if kind >= USED} == used, "a cell shows its busiest block"


def test_a_snapshot_holds_numbers_and_no_text(make: Make) -> None:
    engine = make()
    view = LiveView(engine)
    view.snapshot()
    engine.add_request("req-1", "secretword " * 5, GREEDY, cache_salt="secretsalt")
    engine.step()
    seen = view.snapshot()
    text = json.dumps(seen)
    assert "secret" not in text
    strings: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, str):
            strings.append(value)
        else:
            assert value is None or isinstance(value, int), value

    collect(seen)
    assert set(strings) == {"req-1", "fp32", "none", "fcfs"}, "ids and settings, nothing else"


def test_a_view_that_breaks_harms_nobody(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    view = LiveView(engine)
    view.snapshot()
    monkeypatch.setattr(live, "_row", None)
    engine.add_request("a", "x", GREEDY)
    run(engine)
    assert engine.core.scheduler.pool.num_used == 0
