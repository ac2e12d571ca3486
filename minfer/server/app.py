"""`create_app`: the routes. Each is: take the engine, check the request into a `Job`, answer it whole or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

import minfer
from minfer.engine.async_llm import AsyncLLM
from minfer.server.admission import Admission, take_places
from minfer.server.chat import chat_answer, chat_events
from minfer.server.completions import completion_answer, completion_events
from minfer.server.connection import answer_while_connected
from minfer.server.embeddings import add_embedding_route
from minfer.server.errors import install_handlers
from minfer.server.front import add_front
from minfer.server.generation import Generation
from minfer.server.job import Job, chat_job, completion_job
from minfer.server.keys import ApiKeys, load_keys
from minfer.server.log import log_request
from minfer.server.metrics import HttpCounts, add_metrics_route
from minfer.server.openapi import Application
from minfer.server.options import ServerOptions
from minfer.server.page import add_live_view, add_page
from minfer.server.protocol import ChatCompletionRequest, CompletionRequest, UnknownFields
from minfer.server.records import Listener
from minfer.server.slot import ModelSlot
from minfer.server.sse import open_stream
from minfer.server.tokenize import add_tokenizer_routes


def create_app(
    model: ModelSlot | AsyncLLM, options: ServerOptions, keys: ApiKeys | None = None, listeners: Sequence[Listener] = ()
) -> FastAPI:
    """The ASGI application, for a running engine or for a slot that will get one. `keys` are those of the options, if left out.

    `listeners` are told of each request that is over, beside the log and the metrics.
    """
    slot = model if isinstance(model, ModelSlot) else ModelSlot(model.config.model, options, model)
    keys = load_keys(options) if keys is None else keys
    # No /docs: FastAPI's page loads its scripts from other hosts.
    app = Application(with_keys=bool(keys), title="minfer", version=minfer.__version__, docs_url=None, redoc_url=None)
    install_handlers(app)
    admission, counts = Admission(options.max_queue, options.requests_per_minute, len(keys)), HttpCounts()
    app.state.admission = admission
    add_front(app, slot, options, keys, admission, [log_request, counts, *listeners])
    _add_model_routes(app, slot)
    add_tokenizer_routes(app, slot)
    add_metrics_route(app, slot, options.metrics_compat, admission, counts)
    _add_generation_routes(app, slot, options)
    add_embedding_route(app, slot, options)
    add_live_view(app, slot)
    add_page(app)
    return app


def _add_model_routes(app: FastAPI, slot: ModelSlot) -> None:
    @app.get("/ping")  # Amazon SageMaker's name for it
    @app.get("/health")
    async def health() -> dict[str, Any]:
        return slot.health()

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": minfer.__version__}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(slot), *(_model(slot, name) for name in slot.adapters)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _model(slot, slot.adapter_of(name))


def _add_generation_routes(app: FastAPI, slot: ModelSlot, options: ServerOptions) -> None:
    unknown = UnknownFields()

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        async def respond() -> Response:
            job = _admitted(request, await chat_job(llm, body, options), adapter)
            generation, head = Generation(slot, job), _head(slot, job)
            if body.stream:
                return await open_stream(chat_events(generation, body, head), options)
            return JSONResponse(await chat_answer(generation, body, head))

        llm = slot.require()
        adapter = slot.adapter_of(body.model)
        unknown.note(body)
        return await answer_while_connected(request, respond())

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        async def respond() -> Response:
            job = _admitted(request, await completion_job(llm, body, options), adapter)
            generation, head = Generation(slot, job), _head(slot, job)
            if body.stream:
                return await open_stream(completion_events(generation, body, head), options)
            return JSONResponse(await completion_answer(generation, body, head))

        llm = slot.require()
        adapter = slot.adapter_of(body.model)
        unknown.note(body)
        return await answer_while_connected(request, respond())


def _admitted(request: Request, job: Job, adapter: str | None) -> Job:
    """The job of the key that sent it, with all of its sequences counted in the queue."""
    return replace(job, tenant=take_places(request, len(job.prompts) * job.params.n), lora=adapter)


def _head(slot: ModelSlot, job: Job) -> dict[str, Any]:
    return {"id": job.id, "created": job.created, "model": job.lora or slot.name, "system_fingerprint": f"minfer-{minfer.__version__}"}


def _model(slot: ModelSlot, adapter: str | None = None) -> dict[str, Any]:
    """`root`, `parent` and `max_model_len` are vLLM's: its benchmark needs the first, clients size their prompts by the last.

    A LoRA adapter is a model whose parent is the one that it was made for.
    """
    return {
        "id": adapter or slot.name,
        "object": "model",
        "created": slot.created,
        "owned_by": "minfer",
        "root": slot.root if adapter is None else slot.adapters[adapter],
        "parent": None if adapter is None else slot.name,
        "max_model_len": slot.require().engine.inputs.max_model_len,
    }
