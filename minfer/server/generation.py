"""A job in the engine: its prompts run together, their outputs come as one sequence of (prompt's place, output).

Closing the iterator early aborts what still runs, so whoever reads it holds it in `aclosing`. An output that the caller
didn't end itself ("abort" at shutdown, "error" in the model) is raised, since OpenAI's finish reasons have no word for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, TypeVar

from minfer.engine.outputs import CompletionOutput, OutputKind, RequestOutput
from minfer.server.connection import cancel
from minfer.server.errors import ApiError
from minfer.server.job import Job
from minfer.server.records import GenerationRecord, current_record
from minfer.server.slot import ModelSlot

T = TypeVar("T")


class Generation:
    """One job, run once. Counts its tokens for `usage`."""

    def __init__(self, slot: ModelSlot, job: Job) -> None:
        self.slot = slot
        self.job = job
        self.llm = slot.require()
        self.record = GenerationRecord(job.id, _settings(job), sum(len(prompt.ids) for prompt in job.prompts))
        self._seen: set[int] = set()  # places of the prompts of which something has come

    async def run(self, kind: OutputKind) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """`kind` is "delta" for streams or "final". Raises the engine's errors."""
        request = current_record()
        if request is not None:
            request.generation = self.record
        try:
            streams = [self._one(index, kind) for index in range(len(self.job.prompts))]
            async with aclosing(merged(streams)) as outputs:
                async for index, output in outputs:
                    self._look_at(index, output)
                    yield index, output
            self.record.ending = "done"
        except Exception as error:
            self.record.ending = f"failed: {error}"
            raise

    @property
    def usage(self) -> dict[str, Any]:
        """Prompts are counted once, however large n is. In a stream: so far."""
        done = self.record
        return {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.output_tokens,
            "total_tokens": done.prompt_tokens + done.output_tokens,
            "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
        }

    def _failed(self) -> ApiError:
        if self.job.params.grammar is not None:
            message = "no token could be chosen: the grammar became too complex at this point; simplify the schema, or shorten the output"
            return ApiError(400, message, code="grammar_too_complex")
        return ApiError(500, "the model's output was not a number (NaN) for this request", code="model_error")

    async def _one(self, index: int, kind: OutputKind) -> AsyncGenerator[RequestOutput, None]:
        job = self.job
        # Our own id, not the client's x-request-id: two clients may choose the same.
        request_id = f"{job.id}-{index}"
        prompt = {"prompt_token_ids": job.prompts[index].ids}
        self.slot.running.add(request_id)
        try:
            order: dict[str, Any] = {"priority": job.priority, "tenant": job.tenant, "lora": job.lora}
            stream: Any = self.llm.generate(prompt, job.params, request_id, cache_salt=job.cache_salt, kind=kind, **order)
            async with aclosing(stream):
                async for output in stream:
                    yield output
        finally:
            self.slot.running.discard(request_id)

    def _look_at(self, index: int, output: RequestOutput) -> None:
        if index not in self._seen:
            self._seen.add(index)
            self.record.cached_tokens += output.num_cached_tokens
        if index == 0:
            self.record.metrics = output.metrics
        for completion in output.outputs:
            if completion.finish_reason == "abort":
                raise ApiError(503, "the request was ended because the server is shutting down", code="shutting_down")
            if completion.finish_reason == "error":
                raise self._failed()
            if self.job.score_only:
                _forget(completion)
            self.record.output_tokens += len(completion.token_ids)
            if completion.finish_reason is not None:
                self.record.finish_reasons.append(completion.finish_reason)


def _settings(job: Job) -> dict[str, Any]:
    params = job.params
    settings = {name: getattr(params, name) for name in ("n", "max_tokens", "temperature", "top_p") if getattr(params, name) is not None}
    return settings if job.lora is None else {**settings, "lora": job.lora}


def _forget(completion: CompletionOutput) -> None:
    """Takes back the one token that the engine had to make."""
    completion.text, completion.token_ids = "", []
    completion.logprobs = None if completion.logprobs is None else []
    completion.finish_reason, completion.stop_reason = "length", None


async def merged(streams: list[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of several generators as they come, with their generator's place. The first error ends all."""
    if len(streams) == 1:  # the usual case needs no tasks
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    arrived: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    arrived.put_nowait((index, item))
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            news = await arrived.get()
            if isinstance(news, Exception):
                raise news
            if news is None:
                left -= 1
            else:
                yield news
    finally:
        await cancel(*tasks)
