"""`/v1/chat/completions`: the answer to a `Job` as OpenAI's chat objects, whole or as chunks.

One chunk for one token: the first carries the role beside its text, the last the finish reason. A chunk of its own for either
would be taken for a token by tools that measure latency, and would flatter us. With tools, a chunk's text may be empty while a call is
being written.
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
from minfer.server.tool_calls import ToolCall, ToolParser
from minfer.server.tools import Tools


async def chat_answer(generation: Generation, request: ChatCompletionRequest, head: dict[str, Any]) -> dict[str, Any]:
    """The whole `chat.completion` object; `head` is the part that all answers share."""
    async with aclosing(generation.run("final")) as outputs:
        async for _, output in outputs:
            final = output  # there is one prompt, so one final output
    choices = []
    for completion in final.outputs:
        reply = _Reply(generation.job.tools)
        content, calls = reply.take(completion)
        message: dict[str, Any] = {"role": "assistant", "content": content or None if calls else content}
        if calls:
            message["tool_calls"] = [call.plain() for call in calls]
        choices.append(
            {
                "index": completion.index,
                "message": message,
                "logprobs": _logprobs(generation, request, completion),
                "finish_reason": reply.finish_reason(completion),
                "stop_reason": completion.stop_reason,
            }
        )
    answer = {**head, "object": "chat.completion", "choices": choices, "usage": generation.usage}
    if request.prompt_logprobs is not None:
        answer["prompt_logprobs"] = plain_prompt_logprobs(final.prompt_logprobs)
    return answer


async def chat_events(generation: Generation, request: ChatCompletionRequest, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """The same as events, `[DONE]` included."""
    head = {**head, "object": "chat.completion.chunk"}
    replies: dict[int, _Reply] = {}
    async with aclosing(generation.run("delta")) as outputs:
        async for _, output in outputs:
            for completion in output.outputs:
                reply = replies.setdefault(completion.index, _Reply(generation.job.tools))
                chunk = {**head, "choices": [_chunk_choice(generation, request, completion, reply)]}
                if request.wants_running_usage:
                    chunk["usage"] = generation.usage
                elif request.wants_usage:
                    chunk["usage"] = None
                yield event(chunk)
    if request.wants_usage:
        yield event({**head, "choices": [], "usage": generation.usage})
    yield DONE


class _Reply:
    """One choice on its way out: what of its text is content, and what are tool calls."""

    def __init__(self, tools: Tools | None) -> None:
        self.parser = None if tools is None else ToolParser(tools.syntax)
        self.begun = False

    def take(self, completion: CompletionOutput) -> tuple[str, list[ToolCall]]:
        if self.parser is None:
            return completion.text, []
        content, calls = self.parser.feed(completion.text)
        return content + (self.parser.finish() if completion.finished else ""), calls

    def finish_reason(self, completion: CompletionOutput) -> str | None:
        called = self.parser is not None and self.parser.num_calls > 0
        return "tool_calls" if called and completion.finish_reason == "stop" else completion.finish_reason


def _chunk_choice(generation: Generation, request: ChatCompletionRequest, completion: CompletionOutput, reply: _Reply) -> dict[str, Any]:
    first, reply.begun = not reply.begun, True
    content, calls = reply.take(completion)
    delta: dict[str, Any] = {"role": "assistant", "content": content} if first else {"content": content}
    if completion.finished and not content and not first:
        delta = {}
    if calls and reply.parser is not None:
        before = reply.parser.num_calls - len(calls)
        delta["tool_calls"] = [{"index": before + place, **call.plain()} for place, call in enumerate(calls)]
    return {
        "index": completion.index,
        "delta": delta,
        "logprobs": _logprobs(generation, request, completion),
        "finish_reason": reply.finish_reason(completion),
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
