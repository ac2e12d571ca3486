"""`/v1/chat/completions`: the answer to a `Job` as OpenAI's chat objects, whole or as chunks.

One chunk for one token: the first carries the role beside its text, the last the finish reason. A chunk of its own for either
would be taken for a token by tools that measure latency, and would flatter us.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from minfer.engine.outputs import CompletionOutput
from minfer.server.generation import Generation
from minfer.server.logprobs import chat_logprobs, plain_prompt_logprobs
from minfer.server.protocol import ChatCompletionRequest
from minfer.server.sse import DONE, event


async def chat_answer(generation: Generation, request: ChatCompletionRequest, head: dict[str, Any]) -> dict[str, Any]:
    """The whole `chat.completion` object; `head` is the part that all answers share."""
    async with aclosing(generation.run("final")) as outputs:
        async for _, output in outputs:
            final = output  # there is one prompt, so one final output
    choices = [
        {
            "index": completion.index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": _logprobs(generation, request, completion),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        for completion in final.outputs
    ]
    answer = {**head, "object": "chat.completion", "choices": choices, "usage": generation.usage}
    if request.prompt_logprobs is not None:
        answer["prompt_logprobs"] = plain_prompt_logprobs(final.prompt_logprobs)
    return answer


async def chat_events(generation: Generation, request: ChatCompletionRequest, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """The same as events, `[DONE]` included."""
    head = {**head, "object": "chat.completion.chunk"}
    begun: set[int] = set()
    async with aclosing(generation.run("delta")) as outputs:
        async for _, output in outputs:
            for completion in output.outputs:
                chunk = {**head, "choices": [_chunk_choice(generation, request, completion, completion.index not in begun)]}
                begun.add(completion.index)
                if request.wants_running_usage:
                    chunk["usage"] = generation.usage
                elif request.wants_usage:
                    chunk["usage"] = None
                yield event(chunk)
    if request.wants_usage:
        yield event({**head, "choices": [], "usage": generation.usage})
    yield DONE


def _chunk_choice(generation: Generation, request: ChatCompletionRequest, completion: CompletionOutput, first: bool) -> dict[str, Any]:
    delta = {"role": "assistant", "content": completion.text} if first else {"content": completion.text}
    if completion.finished and not completion.text and not first:
        delta = {}
    return {
        "index": completion.index,
        "delta": delta,
        "logprobs": _logprobs(generation, request, completion),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _logprobs(generation: Generation, request: ChatCompletionRequest, completion: CompletionOutput) -> dict[str, Any] | None:
    """Of the message's tokens: the one that ended it is no part of the message."""
    if completion.logprobs is None:
        return None
    ids, positions, params = completion.token_ids, completion.logprobs, generation.job.params
    enders = (*params.stop_token_ids, *(() if params.ignore_eos else generation.llm.engine.inputs.eos_token_ids))
    if completion.finish_reason == "stop" and ids and ids[-1] in enders and not params.include_stop_str_in_output:
        ids, positions = ids[:-1], positions[:-1]
    return chat_logprobs(generation.llm.tokenizer, ids, positions, request.top_logprobs or 0)
