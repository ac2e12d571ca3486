"""truncate_prompt_tokens: the prompt's last tokens are kept where a request asks for that, and only there."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from http_helpers import post

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "ignore_eos": True}


def test_the_last_tokens_are_what_the_model_reads(client: httpx.Client) -> None:
    text = "The quick brown fox jumps over the lazy dog"
    ids = post(client, "/tokenize", prompt=text)["tokens"]
    kept = post(client, COMPLETE, prompt=ids[-5:], echo=True, **GREEDY)
    for prompt in (text, ids):
        answer = post(client, COMPLETE, prompt=prompt, truncate_prompt_tokens=5, echo=True, **GREEDY)
        assert answer["choices"][0]["text"] == kept["choices"][0]["text"]
        assert answer["usage"] == {**kept["usage"], "prompt_tokens_details": answer["usage"]["prompt_tokens_details"]}
    longer = post(client, COMPLETE, prompt=text, truncate_prompt_tokens=500, **GREEDY)
    assert longer["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("limit", [8, 200])
def test_as_many_as_fit(client: httpx.Client, limit: int) -> None:
    answer = post(client, COMPLETE, prompt=[5] * 2000, truncate_prompt_tokens=-1, max_tokens=limit, ignore_eos=True)
    assert answer["usage"] == {**answer["usage"], "prompt_tokens": 512 - limit, "completion_tokens": limit}
    long = [{"role": "user", "content": "x y " * 2000}]
    answer = post(client, CHAT, messages=long, truncate_prompt_tokens=-1, max_tokens=limit, ignore_eos=True)
    assert answer["usage"]["prompt_tokens"] == 512 - limit
