"""`GrammarCompiler`: from a request's form to a `Grammar` that its sequences can follow.

Compiling is bounded three ways: the source's size (`StructuredOutputsParams`), llguidance's own limits on the work and
the size of what it builds, and the time a caller waits. Two threads do it, and llguidance holds no interpreter lock meanwhile, so
neither the event loop nor the engine notices. The last grammars are kept: most servers see the same few schemas all day.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from minfer.errors import CapacityError, RequestError
from minfer.guided.grammars import grammar_text, invalid_grammar
from minfer.structured_outputs import StructuredOutputsParams
from minfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMPILE_SECONDS = 30.0  # of waiting, for the vocabulary's tables too; the library's own limits end the work long before
COMPILE_THREADS = 2
MAX_WAITING = 256  # grammars in the queue of the compiling threads
KEPT_GRAMMARS = 128
MAX_LEXER_STATES = 50_000  # 1 to 2 kB each


class Grammar:
    """A compiled form. Immutable in use; each sequence follows it with a matcher of its own."""

    def __init__(self, matcher: LLMatcher, num_tokens: int) -> None:
        self._start = matcher
        self.num_tokens = num_tokens  # width of its masks
        self.spoiled = False  # a sequence ran into a limit of the state that all matchers of this grammar share

    def matcher(self) -> LLMatcher:
        return self._start.deep_copy()


class GrammarCompiler:
    """One for an engine. The tables of the vocabulary (a second or two for 128k tokens) are made for the first grammar."""

    def __init__(self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int], keep: int = KEPT_GRAMMARS) -> None:
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids)
        self._keep = keep
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], Future[Grammar]] = OrderedDict()
        self._vocabulary: LLTokenizer | None = None
        self._vocabulary_lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._waiting = 0
        self.num_compiled = 0  # counters: how often the work was done, and how often it was spared
        self.num_reused = 0

    def submit(self, wish: StructuredOutputsParams) -> Future[Grammar]:
        """The grammar, now or later; the future may raise RequestError. Raises it too, where no grammar is possible at all,
        and CapacityError where too many are waiting."""
        self._check()
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
            future = self._kept[key] = self._threads.submit(self._compile, wish)
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

    def _compile(self, wish: StructuredOutputsParams) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        text = grammar_text(wish)
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        vocabulary = self._tables()
        matcher = LLMatcher(vocabulary, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise invalid_grammar(wish, matcher.get_error())
        self.num_compiled += 1
        return Grammar(matcher, vocabulary.vocab_size)

    def _check(self) -> None:
        if importlib.util.find_spec("llguidance") is None:
            raise RequestError(
                'structured output needs llguidance; install it with: pip install "minfer[guided]"', param="structured_outputs"
            )
        if self._tokenizer is None or not self._eos:
            missing = "a tokenizer" if self._tokenizer is None else "an end-of-sequence token"
            raise RequestError(f"structured output needs {missing}, and this model was loaded without", param="structured_outputs")

    def _tables(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._vocabulary_lock:
            if self._vocabulary is None:
                assert self._tokenizer is not None, "checked before"
                self._vocabulary = LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer, self._eos)), eos_token=self._eos)
            return self._vocabulary

    def _count_down(self, future: Future[Grammar]) -> None:
        with self._lock:
            self._waiting -= 1


class _Vocabulary:
    """Our tokenizer in the shape that llguidance reads. Special tokens are no text to it: they never match a grammar."""

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.special_token_ids = [token for token in range(tokenizer.vocab_size) if tokenizer.is_special(token)]
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = eos[0]

    def __call__(self, text: Any) -> list[int]:
        plain = text.decode() if isinstance(text, bytes) else text
        return self._tokenizer.encode(plain, add_special_tokens=False, parse_special=False)


def took_too_long() -> RequestError:
    return RequestError(
        f"the structured output's schema or grammar was not compiled within {COMPILE_SECONDS:g} s; simplify it", param="structured_outputs"
    )


def _usable(future: Future[Grammar]) -> bool:
    """Whether a remembered result may be given out again. Failures may: the same source fails again, and this is cheaper."""
    return not future.done() or future.exception() is not None or not future.result().spoiled
