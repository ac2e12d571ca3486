"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the model's tokenizer for clients that have none, at vLLM's paths and in its shapes.

`lm-eval` scores through them without a copy of the tokenizer, and `vllm bench serve` makes prompts of an exact length with them.
Nothing here goes through the engine, so nothing is refused for its length.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI

from minfer.engine.async_llm import AsyncLLM
from minfer.errors import RequestError
from minfer.server.job import chat_ids
from minfer.server.protocol import Body, ChatInput
from minfer.server.slot import ModelSlot
from minfer.server.tools import read_tools
from minfer.tokenizer import Tokenizer


class TokenizeRequest(ChatInput):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None  # type: ignore[assignment]  # of a chat they are mandatory
    add_special_tokens: bool | None = None  # default: as for a request: yes for a prompt, no for messages
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: list[int]


def add_tokenizer_routes(app: FastAPI, slot: ModelSlot) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        llm = slot.require()
        slot.adapter_of(body.model)  # one tokenizer for all
        tokenizer = _tokenizer(llm)
        ids = await asyncio.to_thread(_ids, llm, tokenizer, body)
        texts = [tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": llm.engine.inputs.max_model_len, "tokens": ids, "token_strs": texts}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """Special tokens are shown: whoever asks wants to see what the ids are."""
        llm = slot.require()
        slot.adapter_of(body.model)  # one tokenizer for all
        tokenizer = _tokenizer(llm)
        llm.engine.inputs.check_ids("tokens", body.tokens)
        return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        llm = slot.require()
        tokenizer = _tokenizer(llm)
        return {
            "eos_token": None,  # clients look for the key
            **tokenizer.special_texts,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_ids": list(llm.engine.inputs.eos_token_ids),
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": llm.engine.inputs.max_model_len,
            "chat_template": tokenizer.chat_template,
        }


def _ids(llm: AsyncLLM, tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("send either prompt or messages", param="prompt")
    if body.prompt is not None:
        return tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    if body.add_special_tokens:
        raise RequestError("add_special_tokens is for prompts; a chat template writes them itself", param="add_special_tokens")
    return chat_ids(llm, body, read_tools(body.tools, None, None, tokenizer))


def _tokenizer(llm: AsyncLLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise RequestError("this model was loaded without a tokenizer; start the server with --tokenizer")
    return llm.tokenizer
