"""Watchers see every request enter, work and end exactly once; a watcher that fails is dismissed, and harms nobody."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from minfer import LLM, SamplingParams
from minfer.engine.core import CoreStep
from minfer.engine.stats import Histogram, RequestStats
from minfer.engine.watch import Watcher
from minfer.errors import EngineDeadError
from minfer.scheduler import Request


class Recorder(Watcher):
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.tokens: Counter[str] = Counter()
        self.computed = 0

    def added(self, requests: Sequence[Request], arrived: float) -> None:
        self.events += [("added", request.request_id) for request in requests]

    def stepped(self, step: CoreStep, started: float, ended: float) -> None:
        assert started < ended
        times = step.times
        assert times.steps == 1
        assert 0 < times.schedule + times.build + times.forward + times.sample + times.wait + times.update <= ended - started
        self.computed += step.plan.num_tokens
        self.tokens.update({item.request.request_id: len(item.drawn) for item in step.plan.scheduled})

    def ended(self, requests: Sequence[Request], at: float) -> None:
        for request in requests:
            assert request.finish_reason is not None
            assert not request.blocks
        self.events += [("ended", request.request_id) for request in requests]


@pytest.fixture
def llm(tiny_llama: Path) -> LLM:
    return LLM(str(tiny_llama), dtype="float32", threads=1, max_model_len=128, kv_cache_memory=2**21, graphs=False)


def watched(llm: LLM) -> Recorder:
    recorder = Recorder()
    llm.engine.watchers.add(recorder)
    return recorder


def test_every_request_is_told_of_once(llm: LLM) -> None:
    recorder, stats = watched(llm), llm.engine.core.scheduler.stats
    params = [SamplingParams(max_tokens=4, ignore_eos=True, n=2), SamplingParams(max_tokens=6, ignore_eos=True)]
    llm.generate(["a b c", "d"], params, use_tqdm=False)
    counts = Counter(recorder.events)
    assert len(counts) == 6
    assert set(counts.values()) == {1}
    assert sorted(recorder.tokens.values()) == [4, 4, 6]
    assert recorder.computed == stats.num_computed_tokens


def test_an_abort_in_the_queue_and_a_failed_step_end_requests_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, engine = watched(llm), llm.engine
    engine.add_request("first", "a", SamplingParams())
    engine.abort(["first"])
    engine.abort(["first"])
    assert recorder.events == [("added", "first"), ("ended", "first")]
    engine.add_request("second", "a", SamplingParams(n=2))

    def fail() -> CoreStep:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(engine.core, "step", fail)
    with pytest.raises(EngineDeadError):
        engine.step()
    engine.fail_all()
    assert sorted(recorder.events[4:]) == [("ended", "second/0"), ("ended", "second/1")]


def test_a_watcher_that_raises_is_dismissed(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Watcher):
        def stepped(self, step: CoreStep, started: float, ended: float) -> None:
            raise OSError("no space left on device")

    llm.engine.watchers.add(Bad())
    recorder = watched(llm)
    with caplog.at_level(logging.ERROR, "minfer.engine"):
        (output,) = llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3
    assert [record.getMessage().split()[0] for record in caplog.records] == ["Bad"]
    assert sum(recorder.tokens.values()) == 3


def test_statistics_count_what_happened(llm: LLM) -> None:
    stats = RequestStats()
    llm.engine.watchers.add(stats)
    prompts = ["The quick brown fox", "A block", "Zwölf"]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    for histogram, count in (
        (stats.time_to_first_token, 3),
        (stats.inter_token_latency, 3 * 4),
        (stats.time_per_output_token, 3),
        (stats.e2e_latency, 3),
        (stats.queue_time, 3),
        (stats.prefill_time, 3),
        (stats.decode_time, 3),
        (stats.inference_time, 3),
    ):
        assert histogram.count == count
        assert histogram.sum > 0
    assert stats.num_output_tokens == stats.output_length.sum == 15
    assert stats.num_prompt_tokens == stats.prompt_length.sum == sum(len(output.prompt_token_ids) for output in outputs)
    assert stats.ended_by == {"stop": 0, "length": 3, "abort": 0, "error": 0}
    assert stats.time_to_first_token.sum == pytest.approx(stats.queue_time.sum + stats.prefill_time.sum)
    assert stats.inference_time.sum == pytest.approx(stats.prefill_time.sum + stats.decode_time.sum)
    assert stats.inter_token_latency.sum == pytest.approx(stats.decode_time.sum)


def test_tokens_after_a_stop_string_are_not_counted(llm: LLM) -> None:
    (free,) = llm.generate("A", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    stats = RequestStats()
    llm.engine.watchers.add(stats)
    stop = free.outputs[0].text[1:3]
    (cut,) = llm.generate("A", SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop=stop), use_tqdm=False)
    assert cut.outputs[0].finish_reason == "stop"
    assert stats.num_output_tokens == len(cut.outputs[0].token_ids) < 8
    assert stats.ended_by["stop"] == 1


def test_a_histogram_counts_bounds_as_inside() -> None:
    histogram = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 2, 5, 6):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1, 1]
    assert (histogram.count, histogram.sum) == (6, 16.0)
