"""An engine that crashes, hangs, refuses or lies costs its own cells, with the reason; it never brings the parent down."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from compare.errors import EngineFailure
from compare.process import EngineProcess, last_words
from compare.protocol import LoadOptions, Request

OPTIONS = LoadOptions("bf16", "cpu", threads=1, max_context=64, max_concurrency=4, vocab_size=100)
ASK = [Request([1, 2, 3], 5), Request([4, 5], 3, arrival=0.01)]


@contextmanager
def fake(kind: str, folder: Path) -> Iterator[EngineProcess]:
    process = EngineProcess("tests.compare.fake_engine", Path(sys.executable), folder / "log", env={"FAKE": kind})
    with process:
        process.load(folder, OPTIONS, limit=30)
        yield process


@pytest.mark.parametrize("kind", ["good", "static", "single"])
def test_every_driver_answers_every_request(kind: str, tmp_path: Path) -> None:
    requests = [Request([1], 4), Request([1, 2], 4), Request([1], 4, arrival=0.02)]
    with fake(kind, tmp_path) as engine:
        traces = engine.generate(requests, limit=30, vocab_size=100)
    assert [len(t.times) for t in traces] == [4, 4, 4]
    assert traces[2].times[0] > 0.02
    assert [t.prompt_tokens for t in traces] == [1, 2, 1]


def test_continuous_batching_overlaps_what_a_single_sequence_cannot(tmp_path: Path) -> None:
    requests = [Request([1], 20), Request([1], 20)]
    with fake("good", tmp_path) as engine:
        together = engine.generate(requests, limit=30)
    with fake("single", tmp_path) as engine:
        apart = engine.generate(requests, limit=30)
    assert together[1].times[0] < together[0].times[-1]
    assert apart[1].times[0] > apart[0].times[-1]


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("lie-early", "before it arrived"),
        ("lie-late", "whole run took"),
        ("lie-more", "where at most 5"),
        ("lie-fewer", "told to ignore end-of-text"),
        ("lie-backwards", "backwards"),
        ("lie-vocabulary", "outside the vocabulary"),
        ("lie-missing", "1 traces for 2 requests"),
    ],
)
def test_a_lie_is_found_out(kind: str, word: str, tmp_path: Path) -> None:
    with fake(kind, tmp_path) as engine, pytest.raises(EngineFailure, match=word) as caught:
        engine.generate(ASK, limit=30, vocab_size=100)
    assert caught.value.kind == "invalid"


def test_a_crash_names_the_signal(tmp_path: Path) -> None:
    with fake("crash", tmp_path) as engine:
        with pytest.raises(EngineFailure, match="SIGKILL") as caught:
            engine.generate(ASK, limit=30)
        assert caught.value.kind == "crash"
        assert not engine.alive


def test_a_hang_ends_at_the_limit_and_the_process_is_gone(tmp_path: Path) -> None:
    with fake("hang", tmp_path) as engine:
        start = time.monotonic()
        with pytest.raises(EngineFailure, match="within 1 s") as caught:
            engine.generate(ASK, limit=1)
        assert caught.value.kind == "timeout"
        assert time.monotonic() - start < 20
        assert not engine.alive


def test_an_error_is_told_and_the_engine_lives_on(tmp_path: Path) -> None:
    with fake("error", tmp_path) as engine:
        with pytest.raises(EngineFailure, match="ValueError: the fake engine refuses"):
            engine.generate(ASK, limit=30)
        assert engine.ask("score", 30, windows=[[1, 2, 3]]) == {"logprobs": [[-1.0, -1.0]]}


def test_what_an_engine_cannot_do_is_unsupported_and_not_failed(tmp_path: Path) -> None:
    with fake("good", tmp_path) as engine, pytest.raises(EngineFailure) as caught:
        engine.ask("next_logprobs", 30, contexts=[[1]], top=3)
    assert caught.value.kind == "unsupported"


def test_a_paused_engine_uses_no_time_and_comes_back(tmp_path: Path) -> None:
    with fake("good", tmp_path) as engine:
        engine.pause()
        state = (Path("/proc") / str(engine._process.pid) / "stat").read_text().rsplit(")", 1)[1].split()[0]
        assert state == "T"
        assert len(engine.generate(ASK, limit=30)) == 2


def test_what_an_engine_prints_lands_in_its_log(tmp_path: Path) -> None:
    with fake("good", tmp_path) as engine:
        engine.generate(ASK, limit=30)
    assert "chats on stdout" in (tmp_path / "log").read_text()
    assert "chats on stdout" in last_words(tmp_path / "log")


def test_a_crash_while_loading_is_a_crash(tmp_path: Path) -> None:
    with pytest.raises(EngineFailure, match="SIGABRT"), fake("crash-load", tmp_path):
        pass
