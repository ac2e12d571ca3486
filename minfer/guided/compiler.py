"""`GrammarCompiler`: from a request's form to a `Grammar` that its sequences can follow.

Compiling is bounded three ways: the source's size (`StructuredOutputsParams`), the library's own limits on the work and
the size of what it builds, and the time a caller waits. Two threads do it, and the library holds no interpreter lock meanwhile, so
neither the event loop nor the engine notices. The last grammars are kept: most servers see the same few schemas all day.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from minfer.config import GuidedBackend
from minfer.errors import CapacityError, RequestError
from minfer.guided.library import Library, Matcher
from minfer.guided.llguidance_library import LLGuidance
from minfer.guided.xgrammar_library import XGrammar
from minfer.structured_outputs import StructuredOutputsParams
from minfer.tokenizer import Tokenizer

COMPILE_SECONDS = 30.0  # of waiting, for the vocabulary's tables too; the library's own limits end the work long before
COMPILE_THREADS = 2
MAX_WAITING = 256  # grammars in the queue of the compiling threads
KEPT_GRAMMARS = 128
EXTRAS: dict[GuidedBackend, str] = {"llguidance": "guided", "xgrammar": "xgrammar"}


class Grammar:
    """A compiled form. Immutable in use; each sequence follows it with a matcher of its own."""

    def __init__(self, start: Matcher, library: Library) -> None:
        self._start = start
        self.library = library
        self.spoiled = False  # a sequence ran into a limit of the state that all matchers of this grammar share

    def matcher(self) -> Matcher:
        return self._start.branch()


class GrammarCompiler:
    """One for an engine."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_token_ids: Sequence[int],
        keep: int = KEPT_GRAMMARS,
        backend: GuidedBackend = "llguidance",
    ) -> None:
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids)
        self._keep = keep
        self._backend = backend
        self._library: Library | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Future[Grammar]] = OrderedDict()
        self._threads: ThreadPoolExecutor | None = None
        self._waiting = 0
        self.num_compiled = 0  # counters: how often the work was done, and how often it was spared
        self.num_reused = 0

    def submit(self, wish: StructuredOutputsParams) -> Future[Grammar]:
        """The grammar, now or later; the future may raise RequestError. Raises it too, where no grammar is possible at all,
        and CapacityError where too many are waiting."""
        library = self._usable_library()
        key = (wish.kind, wish.source)
        with self._lock:
            known = self._kept.get(key)
            if known is not None and _usable(known):
                self._kept.move_to_end(key)
                self.num_reused += 1
                return known
            if self._waiting >= MAX_WAITING:
                raise CapacityError("too many schemas and grammars are waiting to be compiled; try again shortly")
            if self._threads is None:
                self._threads = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="minfer-grammar")
            self._waiting += 1
            future = self._kept[key] = self._threads.submit(self._compile, wish, library)
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        future.add_done_callback(self._count_down)
        return future

    def compile(self, wish: StructuredOutputsParams) -> Grammar:
        """The same, waiting for it."""
        try:
            return self.submit(wish).result(COMPILE_SECONDS)
        except TimeoutError as error:
            raise took_too_long() from error

    def _compile(self, wish: StructuredOutputsParams, library: Library) -> Grammar:
        start = library.start(wish)
        self.num_compiled += 1
        return Grammar(start, library)

    def _usable_library(self) -> Library:
        """The library, which is imported when it has its first form to compile. Raises RequestError where there can be none."""
        name = self._backend
        if importlib.util.find_spec(name) is None:
            raise RequestError(
                f'structured output needs {name}; install it with: pip install "minfer[{EXTRAS[name]}]"', param="structured_outputs"
            )
        if self._tokenizer is None or not self._eos:
            missing = "a tokenizer" if self._tokenizer is None else "an end-of-sequence token"
            raise RequestError(f"structured output needs {missing}, and this model was loaded without", param="structured_outputs")
        if self._library is None:
            made: Library = LLGuidance(self._tokenizer, self._eos) if name == "llguidance" else XGrammar(self._tokenizer, self._eos)
            self._library = made
        return self._library

    def _count_down(self, future: Future[Grammar]) -> None:
        with self._lock:
            self._waiting -= 1


def took_too_long() -> RequestError:
    return RequestError(
        f"the structured output's schema or grammar was not compiled within {COMPILE_SECONDS:g} s; simplify it", param="structured_outputs"
    )


def _usable(future: Future[Grammar]) -> bool:
    """Whether a remembered result may be given out again. Failures may: the same source fails again, and this is cheaper."""
    return not future.done() or future.exception() is not None or not future.result().spoiled
