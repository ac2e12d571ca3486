"""The real `openai` client against the real model, as most users will meet the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from http_helpers import load, running, wait_until_free

from minfer import AsyncLLM

MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Iterator[AsyncLLM]:
    llm = load(smollm2_gguf, dtype="auto", kv_cache_memory=128 << 20, max_model_len=1024)
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def openai_client(smollm2: AsyncLLM) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    with running(smollm2, served_model_name="smollm2-135m", api_key="test-key") as client:
        yield openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="test-key", max_retries=0)


def test_chat(openai_client: Any) -> None:
    (model,) = openai_client.models.list().data
    assert model.id == openai_client.models.retrieve("smollm2-135m").id == "smollm2-135m"
    assert model.max_model_len == 1024
    body: dict[str, Any] = {"model": model.id, "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = openai_client.chat.completions.create(**body)
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    stream = list(openai_client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream[:-1]) == whole.choices[0].message.content
    assert stream[-1].usage.total_tokens == whole.usage.total_tokens
    assert stream[-2].choices[0].finish_reason == "stop"


def test_n_and_logprobs(openai_client: Any) -> None:
    answer = openai_client.chat.completions.create(
        model="smollm2-135m", messages=MESSAGES, n=2, seed=1, temperature=1.5, max_completion_tokens=4, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        entries = choice.logprobs.content
        assert "".join(entry.token for entry in entries) == choice.message.content
        assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_completions(openai_client: Any) -> None:
    answer = openai_client.completions.create(model="smollm2-135m", prompt="The sky is", max_tokens=3, temperature=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == "".join(choice.logprobs.tokens)
    assert choice.logprobs.text_offset == [choice.text.index(token) for token in choice.logprobs.tokens]


def test_structured_output(openai_client: Any) -> None:
    from pydantic import BaseModel

    class Capital(BaseModel):
        country: str
        city: str

    parsed = openai_client.chat.completions.parse(
        model="smollm2-135m", messages=MESSAGES, temperature=0, max_tokens=60, response_format=Capital
    )
    assert parsed.choices[0].message.parsed.city
    answer = openai_client.chat.completions.create(
        model="smollm2-135m", messages=MESSAGES, temperature=0, extra_body={"structured_outputs": {"choice": ["Paris", "Rome"]}}
    )
    assert answer.choices[0].message.content == "Paris"


def test_tools(openai_client: Any) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", "parameters": parameters}}]
    body: dict[str, Any] = {
        "model": "smollm2-135m",
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "temperature": 0,
        "max_tokens": 60,
    }
    answer = openai_client.chat.completions.create(**body).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.function.name, answer.finish_reason) == ("get_weather", "tool_calls")
    with openai_client.chat.completions.stream(**body) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    again = [*body["messages"], answer.message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees, sunny"}]
    assert openai_client.chat.completions.create(**{**body, "messages": again, "tool_choice": "none"}).choices[0].message.content


def test_errors(openai_client: Any) -> None:
    import openai

    create = openai_client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 1024 tokens") as refused:
        create(model="smollm2-135m", messages=MESSAGES, max_tokens=5000, stream=True)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.AuthenticationError):
        openai_client.with_options(api_key="wrong").models.list()


def test_cancel(openai_client: Any, smollm2: AsyncLLM) -> None:
    stream = openai_client.chat.completions.create(
        model="smollm2-135m", messages=MESSAGES, max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _ in zip(range(3), stream, strict=False):
        pass
    assert smollm2.engine.core.scheduler.pool.num_used
    stream.close()
    wait_until_free(smollm2, 5)
