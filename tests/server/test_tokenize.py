"""/tokenize, /detokenize, /tokenizer_info and /version: transformers' ids, vLLM's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from http_helpers import post
from transformers import AutoTokenizer

import minfer
from minfer import AsyncLLM

MESSAGES = [{"role": "user", "content": "Zwölf <|im_end|> Boxkämpfer"}, {"role": "assistant", "content": "Yes"}]


@pytest.fixture(scope="module")
def theirs(tiny_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_tokenizer)


@pytest.mark.parametrize("text", ["The quick brown fox", "", " 🌍 你好", "<|im_start|>user"])
def test_ids_are_those_of_transformers(client: httpx.Client, theirs: Any, text: str) -> None:
    for special in (True, False):
        answer = post(client, "/tokenize", model="tiny", prompt=text, add_special_tokens=special)
        assert answer == {
            "count": len(answer["tokens"]),
            "max_model_len": 512,
            "tokens": theirs.encode(text, add_special_tokens=special),
            "token_strs": None,
        }
        assert post(client, "/detokenize", model="tiny", tokens=answer["tokens"]) == {"prompt": theirs.decode(answer["tokens"])}


def test_token_strings(client: httpx.Client, llm: AsyncLLM) -> None:
    answer = post(client, "/tokenize", prompt="Zwölf 🌍", return_token_strs=True)
    assert len(answer["token_strs"]) == answer["count"]
    assert answer["token_strs"][0].startswith("Z")


def test_a_conversation_is_tokenised_as_a_chat_request_is(client: httpx.Client, theirs: Any) -> None:
    plain = [{"role": "user", "content": "hello"}]
    answer = post(client, "/tokenize", messages=plain)
    assert answer["tokens"] == theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    usage = post(client, "/v1/chat/completions", messages=plain, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == answer["count"]
    going_on = post(client, "/tokenize", messages=MESSAGES, continue_final_message=True)["tokens"]
    markers = going_on.count(theirs.convert_tokens_to_ids("<|im_end|>"))
    assert markers == 1, "the one that the user wrote is text, and the last message is left open"
    closed = post(client, "/tokenize", messages=MESSAGES, add_generation_prompt=False)["tokens"]
    assert closed[: len(going_on)] == going_on


def test_longer_than_the_context_is_fine(client: httpx.Client) -> None:
    assert post(client, "/tokenize", prompt="x y " * 2000)["count"] > 512


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {"tokens": [512]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_refusals(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert client.post(path, json={**body, "model": "other"}).status_code in (400, 404)


def test_tokenizer_info(client: httpx.Client, theirs: Any) -> None:
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == (theirs.bos_token, theirs.eos_token)
    assert (info["bos_token_id"], info["eos_token_ids"]) == (theirs.bos_token_id, [theirs.eos_token_id])
    assert info["chat_template"] == theirs.chat_template
    assert (info["vocab_size"], info["model_max_length"]) == (512, 512)


def test_version_and_ping(client: httpx.Client) -> None:
    assert client.get("/version").json() == {"version": minfer.__version__}
    ping, health = ({**client.get(path).json(), "uptime_seconds": 0} for path in ("/ping", "/health"))
    assert ping == health
