"""`LLM`: the engine for scripts. Prompts in, finished outputs back, in the order of the prompts. The API is vLLM's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minfer.config import EngineConfig
from minfer.engine.engine import Engine
from minfer.engine.input_processor import Prompt
from minfer.engine.outputs import RequestOutput
from minfer.engine.progress import progress_bar
from minfer.errors import EngineDeadError, RequestError
from minfer.sampling_params import SamplingParams
from minfer.scheduler import Pooling
from minfer.tokenizer import Tokenizer

Message = Mapping[str, Any]


class LLM:
    """`LLM("smollm2-135m", dtype="float32")`: keyword arguments are the fields of `EngineConfig`.

    Not thread-safe: one caller at a time. For concurrent callers there is `AsyncLLM`.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.engine = Engine.from_config(EngineConfig.from_options({"model": model, **options}))
        self._ids = itertools.count()

    def get_tokenizer(self) -> Tokenizer:
        if self.engine.tokenizer is None:
            raise RequestError("this model was loaded without a tokenizer; set tokenizer=")
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Runs all prompts together and returns when the last is done. A prompt is a string, `{"prompt_token_ids": [...]}`,
        or a list of ids; `sampling_params` is one for all or one for each, and so is `lora`, the name of the adapter to run it with
        (None: the model as it is).

        Raises RequestError before anything runs if one of them is invalid, and EngineDeadError if the model fails.
        """
        items = _as_list(prompts)
        params = _one_each("sampling_params", sampling_params or SamplingParams(), SamplingParams, len(items))
        priorities = _one_each("priority", priority or 0, int, len(items))
        adapters = _one_each("lora", lora, str | None, len(items))

        def add(request_id: str, index: int) -> None:
            one: dict[str, Any] = {"priority": priorities[index], "lora": adapters[index]}
            self.engine.add_request(request_id, items[index], params[index], kind="final", **one)

        return self._run(len(items), add, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        use_tqdm: bool = True,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Each prompt's `embedding`: its final hidden states, pooled and of length 1. `pooling` takes the last token's, or the
        mean of all. Models that were trained to generate give embeddings that work, not the best there are.
        """
        items = [self.engine.inputs.tokenize(prompt, room_for_output=False)[1] for prompt in _as_list(prompts)]
        adapters = _one_each("lora", lora, str | None, len(items))

        def add(request_id: str, index: int) -> None:
            self.engine.add_embedding(request_id, items[index], pooling, lora=adapters[index])

        return self._run(len(items), add, use_tqdm, "Embedding")

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Like `generate`, for one conversation (a list of messages) or several, through the model's chat template."""
        if not messages:
            raise RequestError("messages is empty; give at least one", param="messages")
        conversations: Any = [messages] if isinstance(messages[0], Mapping) else messages
        tokenizer = self.get_tokenizer()
        prompts = [
            tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **(chat_template_kwargs or {}),
            )
            for conversation in conversations
        ]
        return self.generate([{"prompt_token_ids": ids} for ids in prompts], sampling_params, use_tqdm=use_tqdm, lora=lora)

    def _run(self, count: int, add: Callable[[str, int], None], bar: bool, doing: str = "Generating") -> list[RequestOutput]:
        """Runs `count` requests, each put into the engine by `add` under a new id."""
        ids: list[str] = []
        finished: dict[str, RequestOutput] = {}
        try:
            for index in range(count):
                request_id = str(next(self._ids))
                add(request_id, index)
                ids.append(request_id)
            with progress_bar(doing, len(ids), bar) as progress:
                started, tokens = time.monotonic(), 0
                while len(finished) < len(ids):
                    for output in self.engine.step():
                        finished[output.request_id] = output
                        tokens += sum(len(completion.token_ids) for completion in output.outputs)
                        progress.advance(note=f"{tokens / max(time.monotonic() - started, 1e-9):.0f} tokens/s")
        except EngineDeadError:
            self.engine.fail_all()
            raise
        finally:  # an invalid prompt, a failed model or Ctrl-C: leave nothing behind
            self.engine.abort(request_id for request_id in ids if request_id not in finished)
        return [finished[request_id] for request_id in ids]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several. A bare list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]
    return items


def _one_each(name: str, value: Any, kind: Any, count: int) -> list[Any]:
    if isinstance(value, kind):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise RequestError(f"{name} holds {len(values)} entries for {count} prompts; give one for all or one for each", param=name)
    return values
