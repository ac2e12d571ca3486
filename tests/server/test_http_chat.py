"""/v1/chat/completions against transformers' chat template and the documented shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import chunks, post, streamed_text

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": ""}, {"role": "user", "content": "a block holds tokens"}]
GREEDY: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def hf(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def test_answer(client: httpx.Client, hf: Any) -> None:
    answer = post(client, CHAT, **GREEDY)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "length"
    prompt = len(hf.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False))
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (prompt, 12, prompt + 12)


def test_stream_is_the_answer_with_one_chunk_a_token(client: httpx.Client) -> None:
    whole = post(client, CHAT, **GREEDY)
    parts = chunks(client, CHAT, **GREEDY)
    assert streamed_text(parts) == whole["choices"][0]["message"]["content"]
    assert len(parts) == 12
    assert len({part["id"] for part in parts}) == 1
    choices = [part["choices"][0] for part in parts]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert [choice["finish_reason"] for choice in choices] == [None] * 11 + ["length"]
    assert all("usage" not in part for part in parts), "usage only when asked"


def test_usage_in_streams(client: httpx.Client) -> None:
    usage = post(client, CHAT, **GREEDY)["usage"]
    parts = chunks(client, CHAT, **GREEDY, stream_options={"include_usage": True})
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"] == {**usage, "prompt_tokens_details": parts[-1]["usage"]["prompt_tokens_details"]}
    assert all(part["usage"] is None for part in parts[:-1])
    parts = chunks(client, CHAT, **GREEDY, stream_options={"continuous_usage_stats": True})
    assert [part["usage"]["completion_tokens"] for part in parts] == list(range(1, 13))


def test_the_prompt_comes_from_the_cache_the_second_time(client: httpx.Client) -> None:
    body = {**GREEDY, "messages": [{"role": "user", "content": "blocks " * 60}]}
    first, second = (post(client, CHAT, **body)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] < 32
    assert second["prompt_tokens_details"]["cached_tokens"] > first["prompt_tokens"] - 32
    salted = post(client, CHAT, **body, cache_salt="other tenant")["usage"]
    assert salted["prompt_tokens_details"]["cached_tokens"] == 0


def test_n_sequences(client: httpx.Client) -> None:
    body = {**GREEDY, "temperature": 1.0, "seed": 7, "n": 3}
    whole = post(client, CHAT, **body)
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert whole["usage"]["completion_tokens"] == 36
    parts = chunks(client, CHAT, **body)
    assert [streamed_text(parts, index) for index in range(3)] == texts
    firsts = [next(p["choices"][0] for p in parts if p["choices"][0]["index"] == index) for index in range(3)]
    assert all(first["delta"]["role"] == "assistant" for first in firsts)


def said(entries: list[dict[str, Any]]) -> str:
    """A client's way from logprobs to text: random weights say halves of characters, which only the bytes can tell."""
    return bytes(b for entry in entries for b in entry["bytes"]).decode(errors="replace")


def test_logprobs(client: httpx.Client) -> None:
    body = {**GREEDY, "logprobs": True, "top_logprobs": 3}
    (choice,) = post(client, CHAT, **body)["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    assert said(content) == choice["message"]["content"]
    for entry in content:
        values = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry["logprob"] == values[0] <= 0, "greedy: the most likely"
    parts = chunks(client, CHAT, **body)
    assert [entry for part in parts for entry in part["choices"][0]["logprobs"]["content"]] == content
    assert parts[-1]["choices"][0]["finish_reason"] == "length"


def test_logprobs_leave_out_the_token_that_ended_the_message(client: httpx.Client) -> None:
    biased = {**GREEDY, "ignore_eos": False, "logprobs": True, "logit_bias": {"2": 100}, "min_tokens": 3}
    (choice,) = post(client, CHAT, **biased)["choices"]
    assert choice["finish_reason"] == "stop"
    assert said(choice["logprobs"]["content"]) == choice["message"]["content"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    kept = post(client, CHAT, **biased, include_stop_str_in_output=True, skip_special_tokens=False)["choices"][0]
    assert kept["logprobs"]["content"][-1]["token"] == "<|im_end|>"


def test_content_parts_are_text(client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "a block holds tokens"}]
    whole = post(client, CHAT, **{**GREEDY, "messages": [MESSAGES[0], {"role": "user", "content": parts}]})
    assert whole["choices"][0]["message"] == post(client, CHAT, **GREEDY)["choices"][0]["message"]


def test_continue_final_message(client: httpx.Client, hf: Any) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "The answer is"}]
    usage = post(client, CHAT, **{**GREEDY, "messages": messages}, continue_final_message=True)["usage"]
    assert usage["prompt_tokens"] == len(hf.apply_chat_template(messages, continue_final_message=True, return_dict=False))
    usage = post(client, CHAT, **GREEDY, add_generation_prompt=False)["usage"]
    assert usage["prompt_tokens"] == len(hf.apply_chat_template(MESSAGES, return_dict=False))


def test_null_is_absent(client: httpx.Client) -> None:
    optional = ("max_completion_tokens", "top_p", "top_k", "n", "stop", "seed", "logit_bias", "logprobs", "top_logprobs", "tools",
                "stream", "stream_options", "response_format", "user", "model", "priority", "chat_template_kwargs")  # fmt: skip
    whole = post(client, CHAT, **GREEDY, **dict.fromkeys(optional))
    assert whole["choices"] == post(client, CHAT, **GREEDY)["choices"]


def test_reply_may_fill_the_context(client: httpx.Client) -> None:
    body = {key: value for key, value in GREEDY.items() if key != "max_tokens"}
    usage = post(client, CHAT, **body)["usage"]
    assert usage["total_tokens"] == 512
    assert post(client, CHAT, **body, max_tokens=9, max_completion_tokens=4)["usage"]["completion_tokens"] == 4


def test_prompt_logprobs(client: httpx.Client) -> None:
    whole = post(client, CHAT, **GREEDY, prompt_logprobs=2)
    assert whole["prompt_logprobs"][0] is None
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert min(score["rank"] for score in whole["prompt_logprobs"][1].values()) == 1
