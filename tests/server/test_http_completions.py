"""/v1/completions: shapes, several prompts, echo, and scoring as lm-eval asks for it, against float64 transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from http_helpers import chunks, post, streamed_text

COMPLETE = "/v1/completions"
GREEDY: dict[str, Any] = {"prompt": "Paged caches keep keys", "temperature": 0, "max_tokens": 10, "ignore_eos": True}


@pytest.fixture(scope="module")
def hf(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def reference(tiny_llama: Path) -> Any:
    """Token ids -> log-probabilities of what follows each, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)

    def score(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)

    return score


def test_answer_and_stream(client: httpx.Client, hf: Any, reference: Any) -> None:
    whole = post(client, COMPLETE, **GREEDY)
    assert whole["id"].startswith("cmpl-")
    assert whole["object"] == "text_completion"
    ids = hf(GREEDY["prompt"])["input_ids"]
    prompt_length = len(ids)
    for _ in range(10):
        ids.append(int(reference(ids)[-1].argmax()))
    assert whole["choices"][0]["text"] == hf.decode(ids[prompt_length:])
    parts = chunks(client, COMPLETE, **GREEDY, stream_options={"include_usage": True})
    assert streamed_text(parts) == whole["choices"][0]["text"]
    assert len(parts) == 10 + 1
    assert parts[-1]["usage"]["completion_tokens"] == 10


def test_default_length_is_openais(client: httpx.Client) -> None:
    assert post(client, COMPLETE, prompt="a", ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert post(client, COMPLETE, prompt="a", ignore_eos=True, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_in_every_form(client: httpx.Client, hf: Any, stream: bool) -> None:
    texts = ["Paged caches", "a table names", "fox jumps"]
    ids = [hf(text)["input_ids"] for text in texts]
    alone = [post(client, COMPLETE, **{**GREEDY, "prompt": text})["choices"][0]["text"] for text in texts]
    for prompt, expected in ((texts, alone), (ids, alone), (ids[1], alone[1:2])):
        body = {**GREEDY, "prompt": prompt}
        if stream:
            parts = chunks(client, COMPLETE, **body)
            assert [streamed_text(parts, index) for index in range(len(expected))] == expected
        else:
            assert [choice["text"] for choice in post(client, COMPLETE, **body)["choices"]] == expected


def test_n_and_prompts_are_numbered_together(client: httpx.Client) -> None:
    body = {**GREEDY, "prompt": ["Paged", "fox"], "n": 2, "temperature": 1.0, "seed": 3, "best_of": 2}
    whole = post(client, COMPLETE, **body)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    one = post(client, COMPLETE, **{**body, "prompt": "fox"})
    assert [choice["text"] for choice in whole["choices"][2:]] == [choice["text"] for choice in one["choices"]]


def test_scoring_as_lm_eval_asks(client: httpx.Client, reference: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 400, (length,), generator=generator).tolist() for length in (2, 17, 70, 300)]
    prompts[1] += [int(reference(prompts[1])[-1].argmax())]  # a token that is the greedy one
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    answer = post(client, COMPLETE, **body)
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        scores = choice["logprobs"]
        assert len(scores["token_logprobs"]) == len(scores["top_logprobs"]) == len(ids) + 1
        assert scores["token_logprobs"][0] is None
        assert scores["top_logprobs"][0] is None
        expected = reference(ids)
        values = expected[range(len(ids) - 1), ids[1:]]
        torch.testing.assert_close(torch.tensor(scores["token_logprobs"][1:-1]).double(), values, atol=1e-4, rtol=0)
        greedy = [value == max(top.values()) for value, top in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True)]
        assert greedy[:-1] == (expected[:-1].argmax(-1) == torch.tensor(ids[1:])).tolist()
        assert greedy[-1], "the generated token is greedy's"


@pytest.mark.parametrize("prompt", ["Zwölf 🌍 Boxkämpfer", "The quick"])
def test_echo_and_offsets(client: httpx.Client, hf: Any, prompt: str) -> None:
    body = {**GREEDY, "prompt": prompt, "echo": True, "logprobs": 2}
    (choice,) = post(client, COMPLETE, **body)["choices"]
    assert choice["text"].startswith(prompt)
    scores = choice["logprobs"]
    assert len(scores["tokens"]) == len(hf(prompt)["input_ids"]) + 10
    offsets = scores["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    for start, end, token in zip(offsets, [*offsets[1:], len(choice["text"])], scores["tokens"], strict=True):
        # A broken character shows only when the next token comes, and so belongs to its span.
        assert "\\x" in token or choice["text"][start:end].removeprefix("\ufffd") == token
    by_ids = post(client, COMPLETE, **{**body, "prompt": hf(prompt)["input_ids"]})["choices"][0]
    assert by_ids == choice
    parts = [part["choices"][0] for part in chunks(client, COMPLETE, **body)]
    assert "".join(part["text"] for part in parts) == choice["text"]
    assert {name: [x for part in parts for x in part["logprobs"][name]] for name in scores} == scores


def test_echo_alone(client: httpx.Client, hf: Any) -> None:
    body = {"prompt": "The quick", "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = post(client, COMPLETE, **body)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The quick", "length")
    assert len(choice["logprobs"]["tokens"]) == len(hf("The quick")["input_ids"])
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * (len(choice["logprobs"]["tokens"]) - 1)
    assert answer["usage"]["completion_tokens"] == 0


def test_stops(client: httpx.Client) -> None:
    text = post(client, COMPLETE, **GREEDY)["choices"][0]["text"]
    stop = text[4:7]
    (choice,) = post(client, COMPLETE, **GREEDY, stop=stop)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text[: text.index(stop)], "stop", stop)
    (choice,) = post(client, COMPLETE, **GREEDY, stop=[stop], include_stop_str_in_output=True)["choices"]
    assert choice["text"] == text[: text.index(stop) + len(stop)]
    (choice,) = post(client, COMPLETE, **GREEDY, logit_bias={"300": 100}, stop_token_ids=[300], min_tokens=4)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 300)


def test_seeds(client: httpx.Client) -> None:
    body = {**GREEDY, "temperature": 1.0}
    one, same, other = (post(client, COMPLETE, **body, seed=seed)["choices"][0]["text"] for seed in (1, 1, 2))
    assert one == same != other


def test_special_tokens_are_the_callers_choice(client: httpx.Client) -> None:
    body = {**GREEDY, "logit_bias": {"1": 100}, "max_tokens": 2}
    assert post(client, COMPLETE, **body)["choices"][0]["text"] == ""
    assert post(client, COMPLETE, **body, skip_special_tokens=False)["choices"][0]["text"] == "<|im_start|>" * 2
