"""Request bodies, as pydantic models: what may be sent, and of which type. Ranges are `SamplingParams`' business.

- `null` means absent, for every optional field: clients serialise their unset ones that way.
- Types are strict (`"5"` is no number), since a server that guesses hides the client's bug.
- A field that minfer knows but can't serve is a 400 that names it (`UNSUPPORTED`), unless its value asks for nothing.
- Fields that it has never heard of are ignored, as every OpenAI-compatible server does, and logged once each.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from minfer.errors import RequestError
from minfer.sampling_params import SamplingParams

logger = logging.getLogger("minfer.server")

# Field -> the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),  # of /v1/completions; chats have them
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "structural_tag": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "documents": ([],),
    "chat_template": (),  # never: a template is a program, and the caller's can't be trusted
    "prompt_embeds": (),
    "logits_processors": ([],),
    "allowed_token_ids": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "mm_processor_kwargs": ({},),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
}
# OpenAI's own, which change nothing about the answer of a server without accounts, storage or tools.
HARMLESS = frozenset({"metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier", "user", "guided_decoding_backend"})
MAX_LOGGED_FIELDS = 256
_TOKEN_ID = re.compile(r"[0-9]{1,10}", re.ASCII)
_SAMPLING_FIELDS = (
    "n",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "bad_words",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "seed",
    "skip_special_tokens",
)


def check_prompt(value: Any) -> Any:
    """One sentence, where pydantic would tell what is wrong with each of the four alternatives."""
    items = value if isinstance(value, list) else []
    if isinstance(value, str) or (isinstance(value, list) and any(all(map(fits, items)) for fits in (_is_text, _is_id, _is_ids))):
        return value
    raise PydanticCustomError("prompt", "must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _is_text(item: object) -> bool:
    return isinstance(item, str)


def _is_id(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _is_ids(item: object) -> bool:
    return isinstance(item, list) and all(map(_is_id, item))


class Body(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(Body):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None  # OpenAI's newer name; some clients send both, and then this one counts
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None  # keep so many of the prompt's last tokens; -1: as many as fit
    skip_special_tokens: bool | None = None

    # Forms of the output, see structured.py.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: str | dict[str, Any] | None = None
    grammar: str | None = None

    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_running_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def check(self) -> None:
        """Refuses what can't be served, and what contradicts itself."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name in UNSUPPORTED and value not in UNSUPPORTED[name]:
                raise RequestError(f"{name} is not supported yet; leave it out", param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams; set stream to true, or leave it out", param="stream_options")
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1 and self.truncate_prompt_tokens < 1:
            raise RequestError("truncate_prompt_tokens must be at least 1, or -1 for as many as fit", param="truncate_prompt_tokens")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs can't be streamed; set stream to false", param="prompt_logprobs")

    def sampling_params(self, defaults: Mapping[str, Any], **overrides: Any) -> SamplingParams:
        """`defaults` are for what the request is silent about; `overrides` are what the endpoints read differently: max_tokens,
        log-probabilities, the form of the output.
        """
        values = {**defaults, **{name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}}
        if self.logit_bias is not None:
            values["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        return SamplingParams.from_mapping({**values, **overrides})


class ChatInput(Body):
    """What a chat template makes a prompt of."""

    messages: list[dict[str, Any]]  # the tokenizer checks them, for it knows what the template can take
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class ChatCompletionRequest(ChatInput, GenerationRequest):
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_special_tokens: Literal[False] | None = None  # the template writes them itself
    echo: Literal[False] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")


class CompletionRequest(GenerationRequest):
    prompt: Annotated[str | list[int] | list[str] | list[list[int]], BeforeValidator(check_prompt)]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of other than n is not supported; leave it out", param="best_of", code="unsupported_parameter")
        if self.suffix:
            raise RequestError("suffix is not supported yet; leave it out", param="suffix", code="unsupported_parameter")


class UnknownFields:
    """Logs names that no model has, once each; a client that makes up new ones forever fills neither log nor memory."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def note(self, request: GenerationRequest) -> None:
        options = request.stream_options
        names = [*(request.model_extra or {}), *((options.model_extra or {}) if options is not None else {})]
        for name in names:
            if name not in self._seen and name not in UNSUPPORTED and name not in HARMLESS and len(self._seen) < MAX_LOGGED_FIELDS:
                self._seen.add(name)
                logger.warning("ignoring the unknown request field %r (said once)", name[:100])


def _token_id(key: str) -> int:
    if not _TOKEN_ID.fullmatch(key):
        raise RequestError(f"logit_bias holds the key {key[:40]!r}, which is not a token id", param="logit_bias")
    return int(key)
