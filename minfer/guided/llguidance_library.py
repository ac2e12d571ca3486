"""llguidance behind `Library`: the default, because it never accepted an invalid instance, compiles in milliseconds and needs nothing
else.

Its methods raise nothing: a matcher that meets a mistake or a limit stays in an error state, which is asked for here.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minfer.guided.grammars import grammar_text, invalid_grammar
from minfer.structured_outputs import StructuredOutputsParams
from minfer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

MAX_LEXER_STATES = 50_000  # 1 to 2 kB each


class LLGuidance:
    """The tables of the vocabulary (a second or two for 128k tokens) are made for the first grammar."""

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = list(eos)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._threads: LLExecutor | None = None

    @property
    def num_tokens(self) -> int:
        return self._tokenizer.vocab_size

    def start(self, wish: StructuredOutputsParams) -> LLGuidanceMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tables(), grammar_text(wish), log_level=0, limits=limits)
        if matcher.is_error():
            raise invalid_grammar(wish, matcher.get_error())
        return LLGuidanceMatcher(matcher)

    def fill(self, matchers: Sequence[LLGuidanceMatcher], bits: Tensor) -> None:
        width = bits.shape[1] * 4
        if len(matchers) == 1:
            matchers[0].inner.unsafe_compute_mask_ptr(bits.data_ptr(), width)
            return
        if self._threads is None:
            from llguidance import LLExecutor

            self._threads = LLExecutor()
        pairs = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
        self._threads.unsafe_compute_mask_ptr(pairs, bits.data_ptr(), width, len(matchers))

    def _tables(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer, self._eos)), eos_token=self._eos)
            return self._vocabulary


class LLGuidanceMatcher:
    def __init__(self, inner: LLMatcher) -> None:
        self.inner = inner

    @property
    def ended(self) -> bool:
        return self.inner.is_stopped()

    @property
    def failure(self) -> str | None:
        return self.inner.get_error() if self.inner.is_error() else None

    def take(self, token: int) -> None:
        self.inner.consume_token(token)

    def take_drafts(self, tokens: Sequence[int]) -> int:
        return self.inner.try_consume_tokens(list(tokens))

    def give_back(self, count: int) -> None:
        self.inner.rollback(count)

    def branch(self) -> LLGuidanceMatcher:
        return LLGuidanceMatcher(self.inner.deep_copy())

    def forced(self) -> list[int]:
        return self.inner.compute_ff_tokens()


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
