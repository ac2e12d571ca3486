"""`SamplingParams`: how one request wants its tokens picked. Field names and defaults are vLLM's, so scripts carry over.

Order of the stages (engines differ, so ours is written down): logit bias, bad words and min-tokens masks, then repetition,
presence and frequency penalties, the mask of the structured output, temperature, top-k, top-p, min-p, typical-p.
Log-probabilities are those of the raw logits, before any stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from minfer.errors import RequestError
from minfer.structured_outputs import StructuredOutputsParams

MAX_LOGPROBS = 20  # OpenAI's own limit; more would make every step copy a large part of the vocabulary to the host
MAX_STOP = 16
MAX_N = 128
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 256
MAX_STOP_TOKEN_IDS = 1024
MAX_WORD = 4096  # characters of a stop string or a bad word: each is looked for at every token


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Immutable; raises `RequestError` naming the field when a value is not a number or out of range.

    `temperature=0` is greedy, ties going to the lowest id. `seed` makes the request's tokens a function of the request
    alone, whatever else runs beside it. `logprobs=k` returns the k most likely tokens and the chosen one at each position.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0 or -1: all
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str] = ()
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    # Filled by the engine, which alone knows the tokenizer: `bad_words` as token-id sequences, `structured_outputs` compiled.
    bad_word_token_ids: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    grammar: object = field(default=None, repr=False)
    # Made of the others once, because every step asks every request.
    plain: bool = field(
        init=False, repr=False
    )  # the most likely token that a grammar, if there is one, allows; nothing else changes logits
    looks_back: bool = field(init=False, repr=False)  # picking a token takes the tokens before it, or its scores are wanted
    edits: bool = field(init=False, repr=False)  # biases, bans or penalties change logits

    def __post_init__(self) -> None:
        put = object.__setattr__  # the one place where a frozen instance normalises itself
        put(self, "stop", (self.stop,) if isinstance(self.stop, str) else self._tuple("stop"))
        put(self, "bad_words", self._tuple("bad_words"))
        put(self, "stop_token_ids", self._tuple("stop_token_ids"))
        if isinstance(self.logit_bias, Mapping):
            put(self, "logit_bias", dict(self.logit_bias))  # the caller's may change under a running request
        if _is_int(self.top_k) and self.top_k == -1:
            put(self, "top_k", 0)

        self._check_int("n", 1, MAX_N)
        if self.max_tokens is not None:
            self._check_int("max_tokens", 1)
        self._check_int("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            self._fail("min_tokens", f"must not exceed max_tokens={self.max_tokens}")
        self._check_float("temperature", 0.0, 100.0)
        self._check_int("top_k", 0)
        self._check_float("top_p", 0.0, 1.0, open_low=True)
        self._check_float("min_p", 0.0, 1.0)
        self._check_float("typical_p", 0.0, 1.0, open_low=True)
        self._check_float("repetition_penalty", 0.01, 100.0)  # far below, logits overflow
        self._check_float("presence_penalty", -2.0, 2.0)
        self._check_float("frequency_penalty", -2.0, 2.0)
        if self.seed is not None:
            self._check_int("seed", -(2**63), 2**63 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_int(name, 0, MAX_LOGPROBS)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "must be true or false")
        self._check_lists()
        if self.structured_outputs is not None:
            put(self, "structured_outputs", self._structured(self.structured_outputs))
        penalised = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        banned = bool(self.bad_word_token_ids or self.bad_words) or self.min_tokens > 0
        guided = self.structured_outputs is not None or self.grammar is not None
        put(self, "looks_back", penalised or banned or guided or self.logprobs is not None)
        put(self, "edits", penalised or banned or bool(self.logit_bias))
        put(self, "plain", self.greedy and not self.edits and self.logprobs is None)

    def _structured(self, wish: StructuredOutputsParams | Mapping[str, Any]) -> StructuredOutputsParams:
        if isinstance(wish, Mapping):
            wish = StructuredOutputsParams.from_mapping(wish)
        if not isinstance(wish, StructuredOutputsParams):
            self._fail("structured_outputs", "must be StructuredOutputsParams or a mapping of its fields")
        for name in ("bad_words", "min_tokens"):  # together they could leave nothing to pick
            if getattr(self, name):
                raise RequestError(f"{name} can't be combined with structured output; leave it out", param=name)
        return wish

    def _tuple(self, name: str) -> tuple[Any, ...]:
        """A list field's value as a tuple; a bare string is refused, for it would become a list of its letters."""
        value = getattr(self, name)
        if value is None:
            return ()
        if isinstance(value, str) or not isinstance(value, (Sequence, Set)):
            self._fail(name, "must be a list")
        return tuple(value)

    def _check_lists(self) -> None:
        for name, limit in (("stop", MAX_STOP), ("bad_words", MAX_BAD_WORDS)):
            words = getattr(self, name)
            if len(words) > limit:
                self._fail(name, f"may hold at most {limit} strings")
            if not all(isinstance(word, str) and 0 < len(word) <= MAX_WORD for word in words):
                self._fail(name, f"must hold strings of 1 to {MAX_WORD} characters")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            self._fail("stop_token_ids", f"may hold at most {MAX_STOP_TOKEN_IDS} ids")
        if not all(_is_int(token) and token >= 0 for token in self.stop_token_ids):
            self._fail("stop_token_ids", "must hold token ids, integers from 0")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
                self._fail("logit_bias", f"must map at most {MAX_LOGIT_BIAS} token ids to numbers")
            for token, bias in self.logit_bias.items():
                if not _is_int(token) or token < 0 or not _is_number(bias) or not -100 <= bias <= 100:
                    self._fail("logit_bias", "must map token ids (integers from 0) to numbers from -100 to 100")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Builds one from a caller's dictionary, refusing names that are not fields."""
        known = {f.name for f in fields(cls) if f.init} - {"bad_word_token_ids", "grammar"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise RequestError(f"unknown sampling parameter {unknown[0]!r}; known are {', '.join(sorted(known))}", param=unknown[0])
        return cls(**values)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def _check_int(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if not _is_int(value):
            self._fail(name, "must be an integer")
        if value < low or (high is not None and value > high):
            self._fail(name, f"must be at least {low}" if high is None else f"must be from {low} to {high}")

    def _check_float(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value):
            self._fail(name, "must be a finite number")
        if value > high or value < low or (open_low and value == low):
            self._fail(name, f"must be {'above' if open_low else 'from'} {low:g} {'and at most' if open_low else 'to'} {high:g}")

    def _fail(self, name: str, rule: str) -> NoReturn:
        raise RequestError(f"{name} {rule}, not {_short(getattr(self, name))}", param=name)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print the largest ones
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
