"""The law of streams: joined deltas = the whole text = `decode` of all ids, cut at the leftmost stop string.

Whatever the ids are (half characters, special tokens, words that spell a stop string together), however many come at a step, and
wherever the sequence ends. The oracle is the `tokenizers` library, on the whole list at once.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Oracle

from minfer import SamplingParams
from minfer.engine.core import CoreStep
from minfer.engine.output_processor import OutputProcessor
from minfer.engine.outputs import CompletionOutput, OutputKind
from minfer.scheduler import FinishReason, Request, RequestStatus, ScheduledRequest, SchedulerOutput
from minfer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizer: Path) -> tuple[Tokenizer, Oracle]:
    return Tokenizer.from_folder(tiny_tokenizer), Oracle.from_file(str(tiny_tokenizer / "tokenizer.json"))


def finish(request: Request, reason: FinishReason, stop: Any = None) -> None:
    request.status, request.finish_reason, request.stop_reason = RequestStatus.FINISHED, reason, stop


def run(tokenizer: Tokenizer, ids: list[int], cuts: list[int], params: SamplingParams, kind: OutputKind) -> list[CompletionOutput]:
    """What a caller is told when the model says `ids`, in steps that end at `cuts`."""
    processor = OutputProcessor(tokenizer)
    request = Request("r", [5], params, max_total_tokens=10_000, seed=0)
    processor.add("r", None, [request], kind, time.monotonic())
    told: list[CompletionOutput] = []
    start = 0
    for end in [*sorted(set(cuts)), len(ids)]:
        if request.finished:
            break
        for token in ids[start:end]:
            request.append(token)
        if end == len(ids):
            finish(request, "length")
        step = CoreStep(SchedulerOutput([ScheduledRequest(request, 5, 1, samples=True, drawn=ids[start:end])]))
        for output in processor.process(step, 0.0, finish):
            told += output.outputs
        start = end
    assert request.finished
    assert len(processor) == 0
    return told


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_deltas_whole_text_and_oracle_agree(tokenizers: tuple[Tokenizer, Oracle], data: st.DataObject) -> None:
    tokenizer, oracle = tokenizers
    # Bytes that are only parts of characters are the low ids of this vocabulary, so they are drawn often.
    ids = data.draw(st.lists(st.one_of(st.integers(0, 260), st.integers(0, 511)), min_size=1, max_size=24), "ids")
    cuts = data.draw(st.lists(st.integers(1, len(ids)), max_size=len(ids)), "cuts")
    skip = data.draw(st.booleans(), "skip special tokens")
    text = oracle.decode(ids, skip_special_tokens=skip)
    pieces = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 4)).map(lambda at: text[at[0] : at[0] + at[1]])
    stops = [s for s in data.draw(st.lists(st.one_of(pieces, st.text(max_size=3)), max_size=3), "stops") if s and "\ufffd" not in s]
    places = [text.index(stop) for stop in stops if stop in text]
    params = SamplingParams(max_tokens=None, stop=stops, skip_special_tokens=skip, ignore_eos=True)
    (whole,) = run(tokenizer, ids, cuts, params, "final")
    deltas = run(tokenizer, ids, cuts, params, "delta")
    assert whole.text == text[: min(places, default=None)]
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == whole.token_ids == ids[: len(whole.token_ids)]
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (whole.finish_reason, whole.stop_reason)
    assert [delta.finished for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    assert whole.finish_reason == ("stop" if places else "length")
    if places:
        assert text.startswith(str(whole.stop_reason), min(places))
