"""`/v1/completions`: plain text or token ids in, text out; several prompts, `echo`, and the log-probabilities that scoring needs.

The choice of sequence j of prompt i has the index i x n + j, as in OpenAI's API.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from minfer.engine.outputs import CompletionOutput, RequestOutput
from minfer.server.generation import Generation
from minfer.server.logprobs import CompletionLogprobs, joined, plain_prompt_logprobs
from minfer.server.protocol import CompletionRequest
from minfer.server.sse import DONE, event


async def completion_answer(generation: Generation, request: CompletionRequest, head: dict[str, Any]) -> dict[str, Any]:
    """The whole `text_completion` object; `head` is the part that all answers share."""
    choices: list[dict[str, Any]] = []
    async with aclosing(generation.run("final")) as outputs:
        async for place, output in outputs:
            for completion in output.outputs:
                choice = _Choice(generation, request, place).piece(completion, output)
                if request.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = plain_prompt_logprobs(output.prompt_logprobs)
                choices.append(choice)
    choices.sort(key=lambda choice: int(choice["index"]))
    return {**head, "object": "text_completion", "choices": choices, "usage": generation.usage}


async def completion_events(generation: Generation, request: CompletionRequest, head: dict[str, Any]) -> AsyncGenerator[bytes, None]:
    """The same as events, `[DONE]` included. With echo, a choice's first chunk begins with the prompt."""
    head = {**head, "object": "text_completion"}
    choices: dict[tuple[int, int], _Choice] = {}
    async with aclosing(generation.run("delta")) as outputs:
        async for place, output in outputs:
            for completion in output.outputs:
                key = place, completion.index
                if key not in choices:
                    choices[key] = _Choice(generation, request, place)
                chunk = {**head, "choices": [choices[key].piece(completion, output)]}
                if request.wants_running_usage:
                    chunk["usage"] = generation.usage
                elif request.wants_usage:
                    chunk["usage"] = None
                yield event(chunk)
    if request.wants_usage:
        yield event({**head, "choices": [], "usage": generation.usage})
    yield DONE


class _Choice:
    """One sequence on its way out, in one piece or in many."""

    def __init__(self, generation: Generation, request: CompletionRequest, place: int) -> None:
        self.tokenizer = generation.llm.tokenizer
        self.params = generation.job.params
        self.prompt = generation.job.prompts[place]
        self.first_index = place * self.params.n
        self.echo = bool(request.echo)
        self.k = request.logprobs
        self.logprobs: CompletionLogprobs | None = None  # there from the first piece on

    def piece(self, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        """The choice object for what is new in this sequence."""
        text, logprobs = completion.text, None
        first, self.echo = self.echo, False
        echoed = self._prompt_text() if first else ""
        if self.k is not None and completion.logprobs is not None:
            if self.logprobs is None:
                skip = self.params.skip_special_tokens
                self.logprobs = CompletionLogprobs(self.tokenizer, self.k, skip, len(echoed), self.prompt.ids)
            logprobs = self.logprobs.piece(completion.token_ids, completion.logprobs)
            if first:
                logprobs = joined(self._prompt_logprobs(output), logprobs)
        return {
            "index": self.first_index + completion.index,
            "text": echoed + text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def _prompt_text(self) -> str:
        if self.prompt.text is not None:
            return self.prompt.text
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(self.prompt.ids, skip_special_tokens=self.params.skip_special_tokens)

    def _prompt_logprobs(self, output: RequestOutput) -> dict[str, list[Any]]:
        scores = CompletionLogprobs(self.tokenizer, self.k or 0, self.params.skip_special_tokens)
        return scores.piece(self.prompt.ids, output.prompt_logprobs or [])
