"""The wire format of streams, byte for byte; the law that a stream adds up to the answer; and errors in mid-stream."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx
import pytest
from http_helpers import chunks, post, slow_down, streamed_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minfer import AsyncLLM

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
GOLDEN = """\
data: {"id":"chatcmpl-ID","created":0,"model":"tiny","system_fingerprint":"minfer-V","object":"chat.completion.chunk",\
"choices":[{"index":0,"delta":{"role":"assistant","content":"a"},"logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":null}

data: {"id":"chatcmpl-ID","created":0,"model":"tiny","system_fingerprint":"minfer-V","object":"chat.completion.chunk",\
"choices":[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null,"stop_reason":null}],"usage":null}

data: {"id":"chatcmpl-ID","created":0,"model":"tiny","system_fingerprint":"minfer-V","object":"chat.completion.chunk",\
"choices":[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":"length","stop_reason":null}],"usage":null}

data: {"id":"chatcmpl-ID","created":0,"model":"tiny","system_fingerprint":"minfer-V","object":"chat.completion.chunk",\
"choices":[],"usage":{"prompt_tokens":N,"completion_tokens":3,"total_tokens":N,"prompt_tokens_details":{"cached_tokens":0}}}

data: [DONE]

"""


def test_golden_transcript(client: httpx.Client, llm: AsyncLLM) -> None:
    """A bias decides every token, so that the transcript is the same on any machine."""
    assert llm.tokenizer is not None
    (letter,) = llm.tokenizer.encode("a")
    body = {
        "messages": [{"role": "user", "content": "golden"}],
        "max_tokens": 3,
        "logit_bias": {str(letter): 100},
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": "golden",
    }
    with client.stream("POST", CHAT, json=body) as response:
        text = response.read().decode()
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert "content-length" not in response.headers
    for pattern, name in ((r"chatcmpl-\w+", "chatcmpl-ID"), (r'"created":\d+', '"created":0'), (r"minfer-\d[\w.]*", "minfer-V")):
        text = re.sub(pattern, name, text)
    text = re.sub(r'"(prompt|total)_tokens":\d+', r'"\1_tokens":N', text)
    assert text == GOLDEN


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 5), data=st.data())
def test_deltas_add_up_to_the_answer(client: httpx.Client, seed: int, data: st.DataObject) -> None:
    """For random texts, and stop strings taken out of them: joined deltas == the whole answer == the text cut at its leftmost stop."""
    body: dict[str, Any] = {"prompt": "Zwölf", "max_tokens": 24, "seed": seed, "ignore_eos": True, "temperature": 1.5}
    full = post(client, COMPLETE, **body)["choices"][0]["text"]
    spans = st.tuples(st.integers(0, len(full) - 1), st.integers(1, 6)).map(lambda s: full[s[0] : s[0] + s[1]])
    stops = data.draw(st.lists(st.one_of(spans, st.text(max_size=3, min_size=1)).filter(is_unicode), min_size=1, max_size=4))
    whole = post(client, COMPLETE, **body, stop=stops)["choices"][0]
    parts = chunks(client, COMPLETE, **body, stop=stops)
    assert streamed_text(parts) == whole["text"]
    places = [full.index(stop) for stop in stops if stop in full]
    assert whole["text"] == (full[: min(places)] if places else full)
    assert whole["finish_reason"] == parts[-1]["choices"][0]["finish_reason"]
    assert whole["finish_reason"] == ("stop" if places else "length")


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def test_an_engine_that_dies_in_mid_stream(serve: Any, own_llm: AsyncLLM) -> None:
    """An event that says so, and an end; then no request is taken, and health is no lie."""
    core, calls = own_llm.engine.core, [0]
    step = core.step

    def failing() -> Any:
        calls[0] += 1
        if calls[0] > 5:
            raise RuntimeError("the device is on fire")
        return step()

    core.step = failing  # type: ignore[method-assign]
    with serve(own_llm) as client:
        assert client.get("/health").status_code == 200
        response = client.post(COMPLETE, json={"prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True})
        events = [part.removeprefix("data: ") for part in response.text.strip().split("\n\n")]
        assert [bool(json.loads(event).get("choices")) for event in events] == [True] * 5 + [False]
        error = json.loads(events[-1])["error"]
        assert "on fire" in error["message"]
        assert error["code"] == "engine_dead"
        for response in (client.get("/health"), client.get("/v1/models"), client.post(COMPLETE, json={"prompt": "a"})):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_dead"
    assert own_llm.engine.core.scheduler.pool.num_used == 0


def test_an_engine_that_dies_before_the_first_token(serve: Any, own_llm: AsyncLLM) -> None:
    def failing() -> Any:
        raise RuntimeError("the device is on fire")

    own_llm.engine.core.step = failing  # type: ignore[method-assign]
    with serve(own_llm) as client:
        response = client.post(COMPLETE, json={"prompt": "a", "stream": True})
        assert response.status_code == 503
        assert "on fire" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_comments_keep_a_silent_stream_open(serve: Any, own_llm: AsyncLLM, path: str) -> None:
    slow_down(own_llm, 0.3)
    with serve(own_llm, ping_seconds=0.1) as client:
        prompt = {"messages": [{"role": "user", "content": "x"}]} if path == CHAT else {"prompt": "x"}
        response = client.post(path, json={**prompt, "max_tokens": 3, "ignore_eos": True, "stream": True})
    parts = response.text.strip().split("\n\n")
    assert parts[0] == ": ping", "headers and a comment before the first token"
    assert parts.count(": ping") >= 3
    assert sum(part.startswith("data: {") for part in parts) == 3
    assert parts[-1] == "data: [DONE]"


def test_nothing_is_sent_before_the_first_token(serve: Any, own_llm: AsyncLLM) -> None:
    """Headers or a role-only chunk at once would look like a quick first token."""
    slow_down(own_llm, 0.4)
    started = time.monotonic()
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "ignore_eos": True, "stream": True}
    with serve(own_llm) as client, client.stream("POST", CHAT, json=body) as response:
        assert time.monotonic() - started >= 0.4
        events = [line for line in response.iter_lines() if line]
    assert len(events) == 2 + 1
