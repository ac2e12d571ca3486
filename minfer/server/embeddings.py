"""`/v1/embeddings`: text or token ids in, unit vectors out.

An embedding is the model's final hidden state of the last token (`pooling: "last"`, what vLLM does with a model that generates) or
the mean of all tokens (`"mean"`, which tells more where a model was never trained to put a text's meaning into its end). Prompts go through
the same scheduler as everyone's tokens, so they are batched, chunked and take turns like all others.
"""

from __future__ import annotations

import asyncio
import base64
import math
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from pydantic import BeforeValidator, Field
from starlette.responses import JSONResponse, Response

from minfer.engine.async_llm import AsyncLLM
from minfer.engine.outputs import RequestOutput
from minfer.errors import RequestError
from minfer.server.admission import take_places
from minfer.server.connection import answer_while_connected
from minfer.server.errors import ApiError
from minfer.server.generation import merged
from minfer.server.job import check_priority, split_prompts, too_many_sequences
from minfer.server.options import ServerOptions
from minfer.server.protocol import Body, check_prompt
from minfer.server.records import GenerationRecord, current_record
from minfer.server.slot import ModelSlot


class EmbeddingRequest(Body):
    input: Annotated[str | list[int] | list[str] | list[list[int]], BeforeValidator(check_prompt)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["last", "mean"] | None = None
    add_special_tokens: bool | None = None
    user: str | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None


def add_embedding_route(app: FastAPI, slot: ModelSlot, options: ServerOptions) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        llm = slot.require()
        adapter = slot.adapter_of(body.model)
        return await answer_while_connected(request, _answer(slot, llm, body, request, options, adapter))


async def _answer(
    slot: ModelSlot, llm: AsyncLLM, body: EmbeddingRequest, request: Request, options: ServerOptions, adapter: str | None
) -> Response:
    size = llm.engine.model_config.hidden_size
    if body.dimensions is not None and not 1 <= body.dimensions <= size:
        raise RequestError(f"dimensions must be from 1 to {size}, the width of this model, not {body.dimensions}", param="dimensions")
    check_priority(body.priority, llm)
    prompts = split_prompts(body.input, "input")
    if len(prompts) > options.max_request_sequences:
        raise too_many_sequences(len(prompts), 1, options, "input")
    ids = await asyncio.to_thread(lambda: [_tokenize(llm, prompt, body) for prompt in prompts])
    work = _Embedding(slot, llm, body, ids, take_places(request, len(prompts)), adapter)
    data = await work.run()
    tokens = sum(map(len, ids))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({"object": "list", "data": data, "model": adapter or slot.name, "usage": usage})


@dataclass
class _Embedding:
    """The prompts of one request, in the engine together."""

    slot: ModelSlot
    llm: AsyncLLM
    body: EmbeddingRequest
    prompts: list[list[int]]
    tenant: str
    adapter: str | None

    async def run(self) -> list[dict[str, Any]]:
        job = f"embd-{uuid.uuid4().hex}"
        done = GenerationRecord(job, {}, sum(map(len, self.prompts)))
        request = current_record()
        if request is not None:
            request.generation = done
        data: list[dict[str, Any]] = []
        async with aclosing(merged([self._one(f"{job}-{index}", ids) for index, ids in enumerate(self.prompts)])) as outputs:
            async for index, output in outputs:
                done.cached_tokens += output.num_cached_tokens
                done.metrics = done.metrics or output.metrics
                data.append({"object": "embedding", "index": index, "embedding": self._encoded(_vector(output))})
        data.sort(key=lambda item: int(item["index"]))
        done.ending = "done"
        return data

    async def _one(self, request_id: str, ids: list[int]) -> AsyncGenerator[RequestOutput, None]:
        body = self.body
        self.slot.running.add(request_id)
        try:
            yield await self.llm.embed(
                {"prompt_token_ids": ids},
                request_id,
                pooling=body.pooling or "last",
                priority=body.priority or 0,
                tenant=self.tenant,
                cache_salt=body.cache_salt,
                lora=self.adapter,
            )
        finally:
            self.slot.running.discard(request_id)

    def _encoded(self, vector: list[float]) -> list[float] | str:
        """Fewer `dimensions` are the first ones, brought back to length 1. base64 is of little-endian float32, as OpenAI's."""
        cut = vector[: self.body.dimensions]
        if len(cut) < len(vector):
            length = math.sqrt(sum(value * value for value in cut)) or 1.0
            cut = [value / length for value in cut]
        if self.body.encoding_format == "base64":
            return base64.b64encode(np.asarray(cut, dtype="<f4").tobytes()).decode("ascii")
        return cut


def _vector(output: RequestOutput) -> list[float]:
    if output.outputs[0].finish_reason == "abort":
        raise ApiError(503, "the request was ended because the server is shutting down", code="shutting_down")
    if output.embedding is None or not all(map(math.isfinite, output.embedding)):
        raise ApiError(500, "the model's output was not a number (NaN) for this request", code="model_error")
    return output.embedding


def _tokenize(llm: AsyncLLM, prompt: str | list[int], body: EmbeddingRequest) -> list[int]:
    if isinstance(prompt, str) and body.add_special_tokens is False and llm.tokenizer is not None:
        prompt = llm.tokenizer.encode(prompt, add_special_tokens=False)
    try:
        return llm.engine.inputs.tokenize(prompt, room_for_output=False)[1]
    except RequestError as error:
        if error.param != "prompt":
            raise
        raise RequestError(str(error), param="input", code=error.code) from error
