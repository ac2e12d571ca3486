"""`Job`: a request that has been checked and tokenised, ready for the engine.

All that can be wrong with a request is found here, before any of it is admitted and before a stream starts: unsupported
fields, the prompt against the context, the work it asks for against the server's limits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minfer.engine.async_llm import AsyncLLM
from minfer.errors import RequestError
from minfer.model_config import ModelConfig
from minfer.sampling_params import SamplingParams
from minfer.server.options import ServerOptions
from minfer.server.protocol import ChatCompletionRequest, ChatInput, CompletionRequest, GenerationRequest
from minfer.server.structured import STRUCTURED_FIELDS, in_field, structured_outputs
from minfer.server.tools import Tools, read_tools, without_calls
from minfer.structured_outputs import StructuredOutputsParams

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions; a chat reply may be as long as the context allows
# Arguments of the chat template that have request fields of their own.
_TEMPLATE_ARGUMENTS = frozenset({"self", "messages", "tools", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True)
class TokenizedPrompt:
    text: str | None  # None where the caller gave ids, or messages
    ids: list[int]


@dataclass(frozen=True)
class Job:
    id: str
    prompts: list[TokenizedPrompt]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    tenant: str = ""  # the name of the key that sent it
    lora: str | None = None  # the adapter that was asked for as its model
    score_only: bool = False  # max_tokens=0: the engine makes one token, and nobody sees it
    tools: Tools | None = None
    created: int = field(default_factory=lambda: int(time.time()))


async def chat_job(llm: AsyncLLM, request: ChatCompletionRequest, options: ServerOptions) -> Job:
    """Raises RequestError, for the messages as for anything else."""
    request.check()
    if len(request.messages) > options.max_messages:
        message = f"this chat has {len(request.messages)} messages, and the limit is {options.max_messages}; leave out old ones"
        raise RequestError(message, param="messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    tools = read_tools(request.tools, request.tool_choice, request.parallel_tool_calls, llm.tokenizer)
    call = tools.grammar(llm.tokenizer) if tools is not None and llm.tokenizer is not None else None
    limits = {"max_tokens": request.token_limit, "logprobs": logprobs, "prompt_logprobs": request.prompt_logprobs}
    if tools is not None:
        limits["skip_special_tokens"] = tools.syntax == "hermes" and request.skip_special_tokens is not False  # others' markers are special
    params = await _params(llm, request, sampling_defaults(llm.engine.model_config, options), call, **limits)
    prompt = await asyncio.to_thread(_apply_template, llm, request, tools)
    return dataclasses.replace(_job("chatcmpl", llm, request, params, [prompt], options), tools=tools)


async def completion_job(llm: AsyncLLM, request: CompletionRequest, options: ServerOptions) -> Job:
    request.check()
    limit = DEFAULT_COMPLETION_TOKENS if request.token_limit is None else request.token_limit
    score_only = limit == 0 and bool(request.echo)
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, request.logprobs)
    limit = 1 if score_only else limit
    defaults = sampling_defaults(llm.engine.model_config, options)
    params = await _params(llm, request, defaults, None, max_tokens=limit, logprobs=request.logprobs, prompt_logprobs=prompt_logprobs)
    prompts = split_prompts(request.prompt)
    if len(prompts) * params.n > options.max_request_sequences:  # before the work of tokenising them
        raise too_many_sequences(len(prompts), params.n, options)
    tokenized = await asyncio.to_thread(lambda: [_tokenize(llm, prompt, request, limit) for prompt in prompts])
    return _job("cmpl", llm, request, params, tokenized, options, score_only)


def sampling_defaults(model: ModelConfig, options: ServerOptions) -> dict[str, int | float]:
    """What a request gets that doesn't say: the checkpoint's recommendations (generation_config.json), unless they are switched off."""
    return dict(model.sampling_defaults) if options.generation_config == "auto" else {}


async def _params(
    llm: AsyncLLM, request: GenerationRequest, defaults: Mapping[str, Any], call: StructuredOutputsParams | None, **overrides: Any
) -> SamplingParams:
    """Sampling parameters with the form of the output compiled, so that a schema that can't be used is refused here."""
    form, field_name = structured_outputs({name: getattr(request, name) for name in STRUCTURED_FIELDS})
    if call is not None:
        if form is not None:
            raise RequestError(f"{field_name} and a tool_choice that demands a call exclude each other", param=field_name)
        form, field_name = call, "tools"
    try:
        return await llm.prepare(request.sampling_params(defaults, **overrides, structured_outputs=form))
    except RequestError as error:
        if error.param != "structured_outputs" or field_name is None:
            raise
        raise in_field(error, field_name) from error


def _job(
    prefix: str,
    llm: AsyncLLM,
    request: GenerationRequest,
    params: SamplingParams,
    prompts: list[TokenizedPrompt],
    options: ServerOptions,
    score_only: bool = False,
) -> Job:
    place = "messages" if prefix == "chatcmpl" else "prompt"
    for prompt in prompts:
        _check_context(llm.engine.inputs.max_model_len, len(prompt.ids), 0 if score_only else params.max_tokens, place)
    _check_work(llm.engine.inputs.max_model_len, prompts, params, options)
    check_priority(request.priority, llm)
    return Job(f"{prefix}-{uuid.uuid4().hex}", prompts, params, request.priority or 0, request.cache_salt, score_only=score_only)


def _apply_template(llm: AsyncLLM, request: ChatCompletionRequest, tools: Tools | None) -> TokenizedPrompt:
    ids = _truncated(llm, chat_ids(llm, request, tools), request, request.token_limit)
    return TokenizedPrompt(None, llm.engine.inputs.tokenize(ids)[1])


def chat_ids(llm: AsyncLLM, request: ChatInput, tools: Tools | None) -> list[int]:
    """The conversation as token ids, however many. Raises RequestError for what the template can't take."""
    options = request.chat_template_kwargs or {}
    taken = sorted(_TEMPLATE_ARGUMENTS & set(options))
    if taken:
        raise RequestError(f"chat_template_kwargs can't set {', '.join(taken)}", param="chat_template_kwargs")
    if llm.tokenizer is None:
        raise RequestError("this model was loaded without a tokenizer, so it can't chat; use /v1/completions with token ids")
    continues = bool(request.continue_final_message)
    # Going on with a message rules out opening a new one, so that is not what silence means then.
    opens = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    messages = without_calls(request.messages, llm.tokenizer)
    if tools is not None:
        messages = tools.messages(messages)
    for_template = list(tools.tools) if tools is not None and tools.in_template else None
    return llm.tokenizer.apply_chat_template(
        messages, add_generation_prompt=opens, continue_final_message=continues, tools=for_template, **options
    )


def split_prompts(prompt: str | list[int] | list[str] | list[list[int]], param: str = "prompt") -> list[str | list[int]]:
    """One prompt or several, from the field `param`."""
    if isinstance(prompt, str):
        return [prompt]
    items: list[Any] = prompt
    if not items:
        raise RequestError(f"{param} is an empty list; give at least one prompt", param=param)
    return [items] if isinstance(items[0], int) else items


def _tokenize(llm: AsyncLLM, prompt: str | list[int], request: CompletionRequest, limit: int) -> TokenizedPrompt:
    inputs, truncates = llm.engine.inputs, request.truncate_prompt_tokens is not None
    if llm.tokenizer is None or (isinstance(prompt, str) and not truncates and request.add_special_tokens is not False):
        return TokenizedPrompt(*inputs.tokenize(prompt))
    if not isinstance(prompt, str):
        return TokenizedPrompt(None, inputs.tokenize(_truncated(llm, prompt, request, limit))[1])
    ids = llm.tokenizer.encode(prompt, add_special_tokens=request.add_special_tokens is not False)
    return TokenizedPrompt(None if truncates else prompt, inputs.tokenize(_truncated(llm, ids, request, limit))[1])


def _truncated(llm: AsyncLLM, ids: list[int], request: GenerationRequest, limit: int | None) -> list[int]:
    """The prompt's last tokens, where the request says that the others may go; nothing is ever cut unasked."""
    keep = request.truncate_prompt_tokens
    if keep == -1:
        keep = max(1, llm.engine.inputs.max_model_len - (1 if limit is None else max(1, limit)))
    return ids if keep is None else ids[-keep:]


def _check_context(max_model_len: int, prompt_tokens: int, max_tokens: int | None, place: str) -> None:
    """OpenAI's wording, which clients search for; a prompt that is too long by itself has been refused by the engine."""
    if max_tokens is not None and prompt_tokens + max_tokens > max_model_len:
        raise RequestError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {prompt_tokens + max_tokens} tokens "
            f"({prompt_tokens} in the {place}, {max_tokens} in the completion). Please reduce the length of the {place} or completion.",
            param=place,
            code="context_length_exceeded",
        )


def _check_work(max_model_len: int, prompts: list[TokenizedPrompt], params: SamplingParams, options: ServerOptions) -> None:
    """One request may not occupy the server for hours: its sequences and its tokens are limited, whatever the single fields say."""
    if len(prompts) * params.n > options.max_request_sequences:
        raise too_many_sequences(len(prompts), params.n, options)
    tokens = sum(max_model_len - len(p.ids) if params.max_tokens is None else params.max_tokens for p in prompts) * params.n
    if len(prompts) * params.n > 1 and tokens > options.max_request_tokens:
        raise RequestError(
            f"this request may generate {tokens} tokens ({len(prompts)} prompts x n={params.n} x max_tokens), and the limit for one "
            f"request is {options.max_request_tokens}; lower n or max_tokens, or send several requests",
            param="max_tokens",
        )


def check_priority(priority: int | None, llm: AsyncLLM) -> None:
    if priority and llm.config.policy != "priority":
        raise RequestError("priority needs a server that was started with --policy priority", param="priority")


def too_many_sequences(prompts: int, n: int, options: ServerOptions, param: str = "prompt") -> RequestError:
    message = f"this request asks for {prompts} prompts x n={n} sequences, and the limit is {options.max_request_sequences}"
    return RequestError(message, param="n" if n > 1 else param)
