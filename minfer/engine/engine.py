"""`Engine`: requests in text or ids go in, `RequestOutput`s come out, one `step()` at a time.

It has no thread and no loop of its own: `LLM` calls `step` until all is done, `AsyncLLM` calls it from its thread. If a step
raises, every request in flight is ended with "error", all blocks are released, and the engine refuses further work: what
the model left behind can't be trusted, and a supervisor that restarts the process does better than one that guesses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minfer.config import EngineConfig
from minfer.engine.calibrated import calibrated
from minfer.engine.core import EngineCore
from minfer.engine.input_processor import InputProcessor, Prompt
from minfer.engine.output_processor import OutputProcessor
from minfer.engine.outputs import OutputKind, RequestOutput
from minfer.engine.trace import Trace, TraceFile
from minfer.engine.watch import Watchers
from minfer.errors import EngineDeadError, RequestError
from minfer.guided import GrammarMasks
from minfer.loader import resolve_tokenizer
from minfer.runner import LoadedModel, load_model
from minfer.sampling import LogitsProcessor, PaddedVocabulary
from minfer.sampling_params import SamplingParams
from minfer.scheduler import Pooling, Request
from minfer.tokenizer import Tokenizer


class Engine:
    def __init__(self, loaded: LoadedModel, tokenizer: Tokenizer | None, processors: Sequence[LogitsProcessor] = ()) -> None:
        self.config = loaded.config
        self.model_config = loaded.model_config
        self.tokenizer = tokenizer
        padded = tokenizer is not None and tokenizer.vocab_size < loaded.model_config.vocab_size
        own = [PaddedVocabulary(tokenizer.vocab_size)] if padded and tokenizer is not None else []
        self.grammar_masks = GrammarMasks(forbid=loaded.ops.forbid, pinned=loaded.device.type == "cuda")
        # The grammar has the last word. What the caller's own processors look at isn't known, so steps wait for them.
        everybody = [*own, *processors, self.grammar_masks]
        masks = self.grammar_masks
        self.core = EngineCore(loaded, everybody, forced=masks.forced, begin=masks.begin, may_overlap=not processors)
        self.inputs = InputProcessor(loaded.config, loaded.model_config, tokenizer)
        self.outputs = OutputProcessor(tokenizer)
        self.watchers = Watchers()
        self._death: BaseException | None = None

    @classmethod
    def from_config(cls, config: EngineConfig, on_phase: Callable[[str], None] = lambda name: None) -> Engine:
        """Loads model and tokenizer, telling `on_phase` what it is at. Raises ModelLoadError, ConfigError or CapacityError."""
        trace = TraceFile(config.trace) if config.trace is not None else None  # a path that can't be written costs no loading time
        loaded = load_model(calibrated(config, on_phase), on_phase)
        with loaded.phases("read tokenizer"):
            tokenizer = load_tokenizer(config, loaded)
        with loaded.phases("record step" if config.graphs else "set up"):
            engine = cls(loaded, tokenizer)
        if trace is not None:
            engine.watchers.add(Trace(trace, engine.core.scheduler))
        return engine

    @property
    def dead(self) -> bool:
        return self._death is not None

    @property
    def has_unfinished_requests(self) -> bool:
        return len(self.outputs) > 0

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: Hashable = None,
        lora: str | None = None,
        kind: OutputKind = "cumulative",
    ) -> None:
        """Queues a request, to be run with the LoRA adapter of that name where one is given.

        Raises RequestError if it can't be run; nothing has been admitted then.
        """
        text, ids = self.inputs.tokenize(prompt)
        self.add_tokens(request_id, text, ids, params, priority=priority, tenant=tenant, cache_salt=cache_salt, lora=lora, kind=kind)

    def add_tokens(
        self,
        request_id: str,
        text: str | None,
        ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: Hashable = None,
        lora: str | None = None,
        kind: OutputKind = "cumulative",
        arrived: float | None = None,
    ) -> None:
        """`add_request` for a prompt that `inputs.tokenize` has been through already.

        `arrived` is when its caller asked, in seconds of `time.monotonic()`, for those who measure how long that is ago.
        """
        self._check_new(request_id)
        requests = self.inputs.requests(request_id, ids, params, priority=priority, tenant=tenant, cache_salt=cache_salt, lora=lora)
        self._queue(request_id, text, requests, kind, arrived)

    def add_embedding(
        self,
        request_id: str,
        ids: list[int],
        pooling: Pooling = "last",
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: Hashable = None,
        lora: str | None = None,
        arrived: float | None = None,
    ) -> None:
        """Queues a request for the embedding of a tokenised prompt, which comes in its one output. It is computed beside
        everyone's tokens, in chunks where it is long. `pooling`: the last token's final hidden state, or the mean of all.
        """
        self._check_new(request_id)
        request = self.inputs.embedding(request_id, ids, pooling, priority=priority, tenant=tenant, cache_salt=cache_salt, lora=lora)
        self._queue(request_id, None, [request], "final", arrived)

    def _check_new(self, request_id: str) -> None:
        if self._death is not None:
            raise EngineDeadError(f"the engine stopped after an error: {self._death}") from self._death
        if request_id in self.outputs:
            raise RequestError(f"a request with the id {request_id!r} is already running; ids must be unique", param="request_id")

    def _queue(self, request_id: str, text: str | None, requests: list[Request], kind: OutputKind, arrived: float | None) -> None:
        since = time.monotonic() if arrived is None else arrived
        self.outputs.add(request_id, text, requests, kind, since)
        for request in requests:
            self.core.scheduler.add(request)
        self.watchers.tell(lambda watcher: watcher.added(requests, since))

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """Ends requests where they stand; their blocks are free on return. Unknown or finished ids are ignored."""
        ended = [request for request_id in request_ids for request in self.outputs.requests_of(request_id)]
        for request in ended:
            self.core.scheduler.finish(request, "abort")
        return self._close(ended)

    def step(self) -> list[RequestOutput]:
        """One turn of the loop: the outputs that changed. Raises EngineDeadError if the model failed."""
        if self._death is not None:
            raise EngineDeadError(f"the engine stopped after an error: {self._death}") from self._death
        started = time.monotonic()
        try:
            done = self.core.step()
            outputs = self.outputs.process(done, started, self.core.scheduler.finish)
        except Exception as error:
            self._death = error
            raise EngineDeadError(f"a step of the engine failed: {_why(error)}") from error
        if done.plan.scheduled:
            now = time.monotonic()
            self.watchers.tell(lambda watcher: watcher.stepped(done, started, now))
            self._tell_ended(now)
        return outputs

    def fail_all(self) -> list[RequestOutput]:
        """After a failed step: ends everything in flight with "error" and releases all blocks."""
        ended = [request for request_id in self.outputs.ids() for request in self.outputs.requests_of(request_id)]
        for request in ended:
            self.core.scheduler.finish(request, "error")
        return self._close(ended)

    def _close(self, ended: list[Request]) -> list[RequestOutput]:
        outputs = self.outputs.close(ended)
        self._tell_ended(time.monotonic())
        return outputs

    def _tell_ended(self, at: float) -> None:
        ended = self.outputs.take_ended()
        if ended:
            self.watchers.tell(lambda watcher: watcher.ended(ended, at))


def _why(error: Exception) -> str:
    # torch raises its own OutOfMemoryError on GPUs, and a plain RuntimeError where the machine's memory ends.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return f"there was no memory left ({type(error).__name__}); lower --max-num-batched-tokens or --kv-cache-memory, and restart"
    return f"{type(error).__name__}: {error}"


def load_tokenizer(config: EngineConfig, loaded: LoadedModel) -> Tokenizer | None:
    """The tokenizer that was asked for, else the checkpoint's own; None where there is none (random weights)."""
    source = resolve_tokenizer(config.tokenizer, revision=config.revision) if config.tokenizer else loaded.checkpoint.tokenizer_source
    return None if source is None else open_tokenizer(source)


def open_tokenizer(source: Path | Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_folder(source) if isinstance(source, Path) else Tokenizer.from_gguf_metadata(source)
