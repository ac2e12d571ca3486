"""`AsyncLLM`: the engine for servers. Many concurrent callers, each reading its own stream.

The engine runs in a thread of its own: a step takes milliseconds to seconds, and an event loop that waited for it could not
even accept a connection. Callers put commands (add, abort) into the thread's inbox; after each step the thread hands all new
outputs to the event loop in one call. With nothing to do the thread sleeps on its inbox and uses no CPU.

The thread can end (a step failed) or fail to come back from a step (a driver that hangs). Python can't end a thread, but it
can stop waiting for one: `busy_seconds` tells how long the thread has been at what it does, and `abandon` fails everybody
who waits for it, from any other thread.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Hashable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from minfer.config import EngineConfig
from minfer.engine.engine import Engine
from minfer.engine.input_processor import Prompt
from minfer.engine.outputs import OutputKind, RequestOutput
from minfer.engine.stats import RequestStats
from minfer.errors import EngineDeadError, MinferError
from minfer.guided.compiler import COMPILE_SECONDS, took_too_long
from minfer.sampling_params import SamplingParams
from minfer.scheduler import Pooling
from minfer.structured_outputs import StructuredOutputsParams
from minfer.tokenizer import Tokenizer

logger = logging.getLogger("minfer.engine")

_Command = Callable[[], None]
T = TypeVar("T")


class _Stream:
    """One caller's outputs, or the error that ended them; filled from the engine's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.items: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()


class AsyncLLM:
    """Use as `async for output in llm.generate(...)`, from any number of tasks of one or more event loops."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stats = RequestStats()
        engine.watchers.add(self.stats)
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}  # touched by the engine's thread only
        self._stopping = False
        # Under the door: a reader is either told of the end, or refused at the entrance.
        self._door = threading.Lock()
        self._readers: set[_Stream] = set()
        self._end: EngineDeadError | None = None
        self._busy_since: float | None = None  # None while the thread waits for work
        self._thread = threading.Thread(target=self._work, name="minfer-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_options(cls, model: str, **options: Any) -> AsyncLLM:
        return cls(Engine.from_config(EngineConfig.from_options({"model": model, **options})))

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.engine.tokenizer

    @property
    def is_running(self) -> bool:
        """False once the engine has died, been shut down or been abandoned."""
        return self._end is None and not self._stopping and self._thread.is_alive()

    @property
    def end(self) -> EngineDeadError | None:
        """What everybody was told when the engine ended; None while it lives."""
        return self._end

    @property
    def busy_seconds(self) -> float:
        """How long the thread has been in its present step (or command); 0 while it waits for work."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: Hashable = None,
        lora: str | None = None,
        kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yields the request's outputs as they come. Leaving the loop early, or being cancelled, aborts the request.

        `priority` counts with the policy "priority", `tenant` (on whose account the request runs) with "fair". `lora` names the
        adapter to run it with.

        Raises RequestError if the request can't be run, EngineDeadError if the engine fails or has failed.
        """
        arrived = time.monotonic()
        request_id = request_id or uuid.uuid4().hex
        if isinstance(prompt, str) or (isinstance(prompt, Mapping) and "prompt" in prompt):
            # Tokenising a long prompt takes milliseconds: neither the event loop nor the engine's thread waits for it.
            text, ids = await asyncio.to_thread(self.engine.inputs.tokenize, prompt)
        else:
            text, ids = self.engine.inputs.tokenize(prompt)
        sampling_params = await self.prepare(sampling_params)

        def add() -> None:
            order: dict[str, Any] = {"priority": priority, "tenant": tenant, "arrived": arrived}
            self.engine.add_tokens(request_id, text, ids, sampling_params, cache_salt=cache_salt, lora=lora, kind=kind, **order)

        async with aclosing(self._run(request_id, add)) as outputs:
            async for output in outputs:
                yield output

    async def embed(
        self,
        prompt: Prompt,
        request_id: str | None = None,
        *,
        pooling: Pooling = "last",
        priority: int = 0,
        tenant: str = "",
        cache_salt: Hashable = None,
        lora: str | None = None,
    ) -> RequestOutput:
        """The output that holds the prompt's embedding. Being cancelled aborts the request. Raises as `generate` does."""
        arrived = time.monotonic()
        request_id = request_id or uuid.uuid4().hex
        _, ids = await asyncio.to_thread(self.engine.inputs.tokenize, prompt, room_for_output=False)

        def add() -> None:
            order: dict[str, Any] = {"priority": priority, "tenant": tenant, "arrived": arrived}
            self.engine.add_embedding(request_id, ids, pooling, cache_salt=cache_salt, lora=lora, **order)

        async with aclosing(self._run(request_id, add)) as outputs:
            return await anext(outputs)

    async def _run(self, request_id: str, add: Callable[[], None]) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of a request that `add` puts into the engine, in its thread."""
        stream = _Stream(asyncio.get_running_loop())
        self._send(lambda: self._admit(request_id, stream, add), stream)
        finished = False
        try:
            while not finished:
                item = await stream.items.get()
                if isinstance(item, Exception):
                    finished = True
                    raise item
                finished = item.finished
                yield item
        finally:
            with self._door:
                self._readers.discard(stream)
            if not finished and self.is_running:
                self._inbox.put(lambda: self._abort(request_id, stream))

    async def abort(self, request_id: str) -> None:
        """Ends a request; whoever reads its stream gets a last output with finish_reason "abort"."""
        self._send(lambda: self._deliver(self.engine.abort([request_id])))

    async def inspect(self, look: Callable[[Engine], T]) -> T:
        """What `look` finds, called by the engine's thread between two steps: of one moment, and without a lock.

        The next step waits for it, so it is to be quick. Raises what it raises, or EngineDeadError.
        """
        found: concurrent.futures.Future[T] = concurrent.futures.Future()

        def obey() -> None:
            if found.set_running_or_notify_cancel():
                try:
                    found.set_result(look(self.engine))
                except Exception as error:
                    found.set_exception(error)

        self._send(obey)
        return await asyncio.wrap_future(found)

    async def prepare(self, params: SamplingParams) -> SamplingParams:
        """The parameters with their structured output compiled, which is done while the engine and the event loop go on.

        `generate` does it too; who wants the RequestError earlier calls this first.
        """
        if not isinstance(params.structured_outputs, StructuredOutputsParams) or params.grammar is not None:
            return params
        compiling = asyncio.wrap_future(self.engine.inputs.grammars.submit(params.structured_outputs))
        try:
            # Shielded: others may wait for the same grammar.
            grammar = await asyncio.wait_for(asyncio.shield(compiling), COMPILE_SECONDS)
        except asyncio.TimeoutError as error:
            raise took_too_long() from error
        return dataclasses.replace(params, grammar=grammar)

    def shutdown(self, seconds: float | None = None) -> None:
        """Stops the thread after the step it is in; requests in flight get an EngineDeadError. Idempotent.

        Waits for the thread, `seconds` at most: one that hangs in a step never ends.
        """
        if not self._stopping:
            self._stopping = True
            self._inbox.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    def abandon(self, reason: str) -> None:
        """Fails everybody who waits and refuses whoever comes later, without waiting for the step that doesn't end."""
        logger.critical("%s", reason)
        self._close(EngineDeadError(reason))

    def _send(self, command: _Command, reader: _Stream | None = None) -> None:
        with self._door:
            if self._end is not None:
                raise EngineDeadError(f"the engine is not running any more ({self._end}); restart the server")
            if reader is not None:
                self._readers.add(reader)
            self._inbox.put(command)

    def _work(self) -> None:
        try:
            while not self._stopping and self._end is None:
                self._obey(block=not self.engine.has_unfinished_requests)
                if self.engine.has_unfinished_requests and not self._stopping:
                    self._busy_since = time.monotonic()
                    self._deliver(self.engine.step())
            self._fail_everyone(EngineDeadError("the engine was shut down"))
        except BaseException as error:  # also what ends a thread without being an error: nobody may wait for ever
            logger.exception("the engine stopped")
            text = str(error) or type(error).__name__
            self._fail_everyone(error if isinstance(error, EngineDeadError) else EngineDeadError(f"the engine stopped: {text}"))
        finally:
            self._busy_since = None

    def _obey(self, block: bool) -> None:
        """Carries out the waiting commands; waits for one if there is nothing else to do."""
        if block:
            self._busy_since = None
        try:
            command = self._inbox.get(block)
            self._busy_since = time.monotonic()
            while True:
                command()
                command = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _admit(self, request_id: str, stream: _Stream, add: Callable[[], None]) -> None:
        try:
            add()
        except Exception as error:  # also a bug that this request has found: it must not be everybody's
            self.engine.abort([request_id] if not isinstance(error, MinferError) else [])
            self._put({stream: [error]})
        else:
            self._streams[request_id] = stream

    def _abort(self, request_id: str, stream: _Stream) -> None:
        if self._streams.get(request_id) is stream:  # not a later request that reuses the id
            del self._streams[request_id]
            self.engine.abort([request_id])

    def _deliver(self, outputs: Iterable[RequestOutput]) -> None:
        news: dict[_Stream, list[RequestOutput | Exception]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                news.setdefault(stream, []).append(output)
                if output.finished:
                    del self._streams[output.request_id]
        self._put(news)

    def _fail_everyone(self, error: EngineDeadError) -> None:
        """The end as the engine's own thread brings it: its blocks are released before anybody is told."""
        self._streams.clear()
        try:
            self.engine.fail_all()
        finally:
            self._close(error)

    def _close(self, error: EngineDeadError) -> None:
        """Every reader gets the error, also those whose request is still in the inbox; the first error is the one that counts."""
        with self._door:
            self._end = self._end or error
            readers, self._readers = self._readers, set()
        self._put({stream: [error] for stream in readers})

    def _put(self, news: dict[_Stream, list[RequestOutput | Exception]]) -> None:
        loops: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, RequestOutput | Exception]]] = {}
        for stream, items in news.items():
            loops.setdefault(stream.loop, []).extend((stream, item) for item in items)
        for loop, pairs in loops.items():
            try:
                loop.call_soon_threadsafe(_fill, pairs)
            except RuntimeError:  # the loop was closed: nobody reads these streams any more
                logger.debug("dropped %d outputs of a closed event loop", len(pairs))


def _fill(pairs: list[tuple[_Stream, RequestOutput | Exception]]) -> None:
    for stream, item in pairs:
        stream.items.put_nowait(item)
