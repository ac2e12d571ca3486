"""What callers send -> `Request`s, checked before anything is admitted.

A request that gets past here can be run: its ids exist, it fits the context and the pool, its parameters are in range. So
nothing that a caller sends can surprise the step loop, where an error would be everybody's.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, get_args

from minfer.config import EngineConfig
from minfer.errors import RequestError
from minfer.guided import Grammar, GrammarCompiler
from minfer.model_config import ModelConfig
from minfer.sampling import derive_seed
from minfer.sampling_params import SamplingParams
from minfer.scheduler import Pooling, Request
from minfer.structured_outputs import StructuredOutputsParams
from minfer.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any] | Sequence[int]


class InputProcessor:
    def __init__(self, config: EngineConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
        assert config.max_model_len is not None, "the config of a loaded model has it"
        self.max_model_len = config.max_model_len
        self.default_seed = config.seed
        self.vocab_size = min(model.vocab_size, tokenizer.vocab_size if tokenizer is not None else model.vocab_size)
        eos = tokenizer.eos_token_ids if tokenizer is not None else ()
        self.eos_token_ids = tuple(dict.fromkeys((*model.eos_token_ids, *eos)))
        self.tokenizer = tokenizer
        self.adapters = {name: number for number, name in enumerate(config.adapters, 1)}
        self.grammars = GrammarCompiler(tokenizer, self.eos_token_ids, backend=config.guided_backend)
        self._arrivals = itertools.count()

    def tokenize(self, prompt: Prompt, *, room_for_output: bool = True) -> tuple[str | None, list[int]]:
        """A string, `{"prompt": str}`, `{"prompt_token_ids": [int]}` or a list of ids -> (text if there was one, ids)."""
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown or len(prompt) != 1:
                raise RequestError(f'a prompt must hold either "prompt" or "prompt_token_ids", not {sorted(prompt)}', param="prompt")
            prompt = next(iter(prompt.values()))
        text: str | None = None
        if isinstance(prompt, str):
            text, ids = prompt, self._tokenizer("a prompt in text").encode(prompt)
        elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
            ids = [*prompt]
        else:
            raise RequestError(f"a prompt must be a string or a list of token ids, not {type(prompt).__name__}", param="prompt")
        self.check_ids("prompt", ids)
        if not ids:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if len(ids) + room_for_output > self.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt has {len(ids)} tokens"
                f"{', which leaves no room for output' if room_for_output else ''}. Please shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        return text, ids

    def requests(
        self,
        request_id: str,
        ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: Hashable = None,
        lora: str | None = None,
    ) -> list[Request]:
        """The `n` sequences of one request. Siblings fork from the first one, which alone scores the prompt."""
        self._check_params(params)
        adapter = self.adapter(lora)
        limit = self.max_model_len
        if params.max_tokens is not None:
            limit = min(limit, len(ids) + params.max_tokens)
        if isinstance(params.structured_outputs, StructuredOutputsParams) and not isinstance(params.grammar, Grammar):
            params = dataclasses.replace(params, grammar=self.grammars.compile(params.structured_outputs))
        if params.bad_words:
            params = dataclasses.replace(params, bad_word_token_ids=self._bad_word_ids(params.bad_words))
        root_seed = params.seed if params.seed is not None else self.default_seed
        requests: list[Request] = []
        for index in range(params.n):
            requests.append(
                Request(
                    request_id=request_id if params.n == 1 else f"{request_id}/{index}",
                    prompt_token_ids=ids,
                    params=params if index == 0 else dataclasses.replace(params, prompt_logprobs=None),
                    max_total_tokens=limit,
                    seed=derive_seed(root_seed, index),
                    eos_token_ids=self.eos_token_ids,
                    arrival=next(self._arrivals),
                    priority=priority,
                    tenant=tenant,
                    adapter=adapter,
                    cache_key=(adapter, cache_salt),
                    fork_of=requests[0] if requests else None,
                )
            )
        return requests

    def embedding(
        self,
        request_id: str,
        ids: list[int],
        pooling: Pooling,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: Hashable = None,
        lora: str | None = None,
    ) -> Request:
        """A request that ends with its prompt."""
        if pooling not in get_args(Pooling):
            raise RequestError(f"pooling must be one of {', '.join(get_args(Pooling))}, not {str(pooling)[:40]!r}", param="pooling")
        adapter = self.adapter(lora)
        return Request(
            request_id=request_id,
            prompt_token_ids=ids,
            params=SamplingParams(max_tokens=None),
            max_total_tokens=len(ids),
            seed=0,
            arrival=next(self._arrivals),
            priority=priority,
            tenant=tenant,
            adapter=adapter,
            cache_key=(adapter, cache_salt),
            pooling=pooling,
        )

    def adapter(self, name: str | None) -> int:
        """The number of the LoRA adapter of this name, 0 for None. Raises RequestError for one that isn't loaded."""
        if name is None:
            return 0
        if not isinstance(name, str) or name not in self.adapters:
            known = ", ".join(self.adapters) or "none was loaded (set lora=)"
            raise RequestError(f"there is no LoRA adapter {str(name)[:100]!r}; known: {known}", param="lora")
        return self.adapters[name]

    def _check_params(self, params: SamplingParams) -> None:
        for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids)):
            self.check_ids(name, list(ids))
        if params.stop:
            self._tokenizer("a stop string")

    def check_ids(self, param: str, ids: list[int]) -> None:
        """Raises RequestError, about the field `param`, for what is no token id of this model."""
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab_size:
                raise RequestError(f"{param} holds {token!r}, which is not a token id (0 to {self.vocab_size - 1})", param=param)

    def _bad_word_ids(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it is spelled at the start of a text and after a space, since tokenizers tell the two apart."""
        spellings = (text for word in words for text in (word, " " + word.lstrip()))
        encode = self._tokenizer("bad_words").encode
        ids = (tuple(encode(text, add_special_tokens=False)) for text in spellings)
        return tuple(dict.fromkeys(sequence for sequence in ids if sequence))

    def _tokenizer(self, purpose: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{purpose} needs a tokenizer, and this model was loaded without one; send token ids, or set --tokenizer")
        return self.tokenizer
