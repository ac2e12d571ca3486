"""The trace is valid JSON at every moment, tells the truth about every step, and costs nobody an answer when it fails."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from minfer import LLM, SamplingParams
from minfer.errors import ConfigError

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
BASE: dict[str, Any] = {"dtype": "float32", "threads": 1, "max_model_len": 128, "kv_cache_memory": 2**21, "graphs": False}


def traced(tiny_llama: Path, file: Path, **options: Any) -> LLM:
    return LLM(str(tiny_llama), trace=str(file), **BASE, **options)


def test_a_trace_tells_every_step_and_every_request(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    llm = traced(tiny_llama, file, speculative="ngram", ngram_min_match=1, adaptive_drafts=False, num_draft_tokens=2)
    outputs = llm.generate(
        ["The quick brown fox", "a b a b a b"], [PARAMS, SamplingParams(max_tokens=9, n=2, ignore_eos=True)], use_tqdm=False
    )
    events = json.loads(file.read_text())
    core = llm.engine.core
    steps = [event for event in events if event["name"] == "step"]
    assert len(steps) == core.times.steps
    assert sum(step["args"]["tokens"] for step in steps) == core.scheduler.stats.num_computed_tokens
    for step in steps:
        assert sum(step["args"]["requests"].values()) == step["args"]["tokens"]
        inside = [
            e
            for e in events
            if e["ph"] == "X" and e is not step and step["ts"] <= e["ts"] and e["ts"] + e["dur"] <= step["ts"] + step["dur"] + 1
        ]
        assert [e["name"] for e in inside] == ["schedule", "build", "forward", "sample", "wait", "update", "output"]
        assert sum(e["dur"] for e in inside) == pytest.approx(step["dur"], abs=2)
    by_request: dict[str, list[Any]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "request":
            by_request[event["id"]].append(event)
    assert len(by_request) == 3
    for parts in by_request.values():
        assert [part["ph"] for part in parts] == ["b", "n", "e"]
        assert parts[0]["ts"] < parts[1]["ts"] <= parts[2]["ts"]
        assert parts[2]["args"]["finish_reason"] == "length"
    counters: dict[str, int] = defaultdict(int)
    for event in events:
        if event["name"] == "batch, tokens":
            for kind, count in event["args"].items():
                counters[kind] += count
    assert counters["prompt"] == sum(len(o.prompt_token_ids) for o in outputs) + 1  # the sibling computes the prompt's last token again
    assert counters["drafts"] == core.speculation.stats.num_draft_tokens
    last = {event["name"]: event["args"] for event in events if event["ph"] == "C"}
    assert last["requests"] == {"running": 0, "waiting": 0}
    assert last["blocks"] == {"used": 0}


def test_the_file_is_whole_after_each_event(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    llm = traced(tiny_llama, file)
    assert isinstance(json.loads(file.read_text()), list)
    llm.engine.add_request("a", "hello", PARAMS)
    sizes = []
    while llm.engine.has_unfinished_requests:
        llm.engine.step()
        sizes.append(len(json.loads(file.read_text())))
    assert sizes == sorted(set(sizes))


def test_a_killed_process_leaves_a_whole_file(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    code = f"""
from minfer import LLM, SamplingParams
llm = LLM({str(tiny_llama)!r}, trace={str(file)!r}, **{BASE!r})
while True:
    llm.generate(["a"] * 4, SamplingParams(max_tokens=50, ignore_eos=True), use_tqdm=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not file.exists() or file.stat().st_size < 50_000:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    assert len(json.loads(file.read_text())) > 20


@pytest.mark.parametrize("how", ["error", "half"])
def test_a_full_disk(tiny_llama: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The trace ends with its last whole event, one warning is logged, and the answer comes."""
    file = tmp_path / "trace.json"
    llm = traced(tiny_llama, file)
    write, room = os.pwrite, [4000]

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if offset + len(data) <= room[0]:
            return write(fd, data, offset)
        if how == "half":
            return write(fd, data[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with caplog.at_level(logging.WARNING, "minfer.engine"):
        (output,) = llm.generate("hello", PARAMS, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 6
    events = json.loads(file.read_text())
    assert any(event["name"] == "step" for event in events)
    assert not any(event["ph"] == "e" for event in events)
    (record,) = caplog.records
    assert "goes on without" in record.getMessage()


def test_a_path_that_cannot_be_written_is_told_before_loading(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trace .* can't be written: No such file or directory"):
        LLM("no-such-model", trace=str(tmp_path / "missing" / "trace.json"))
