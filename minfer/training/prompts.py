"""The prompts whose answers a head is trained on: a file's, or, without one, questions that the model puts to itself.

A chat model was trained on conversations, so given only the opening of a user's turn it writes one (Magpie, Xu et al.,
arXiv 2406.08464). That needs no data, in any language or field that the model knows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minfer.engine.llm import LLM
from minfer.errors import ConfigError
from minfer.sampling_params import SamplingParams
from minfer.tokenizer import Tokenizer

MARK = "\x02question\x03"  # stands for the user's words, to see what the template puts around them
LONGEST_QUESTION = 96


def read_prompts(file: Path, tokenizer: Tokenizer, max_len: int) -> list[list[int]]:
    """One prompt a line: JSON with `messages` (all up to the last answer), `prompt` (a user's words), or plain text (the same)."""
    prompts = []
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--data {file} can't be read: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            ids = tokenizer.apply_chat_template(_messages(line, f"{file}, line {number}"))
            prompts.append(ids[-max_len:])
    if not prompts:
        raise ConfigError(f"--data {file} holds no prompts; put one on each line")
    return prompts


def _messages(line: str, where: str) -> list[dict[str, Any]]:
    if not line.lstrip().startswith("{"):
        return [{"role": "user", "content": line.strip()}]
    try:
        item = json.loads(line)
        if "messages" not in item:
            return [{"role": "user", "content": str(item["prompt"])}]
        messages = [dict(message) for message in item["messages"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{where} is no JSON object with "messages" or "prompt": {error}') from error
    while messages and messages[-1].get("role") == "assistant":
        messages.pop()
    if not messages:
        raise ConfigError(f"{where} holds no words of a user")
    return messages


def ask_itself(llm: LLM, count: int, seed: int = 0, *, show_progress: bool = True) -> list[list[int]]:
    """`count` questions in the model's own words, as prompts. Raises ConfigError where the chat template doesn't show a user's turn."""
    tokenizer = llm.get_tokenizer()
    text = tokenizer.decode(tokenizer.apply_chat_template([{"role": "user", "content": MARK}]), skip_special_tokens=False)
    opening, found, _ = text.partition(MARK)
    if not found:
        raise ConfigError("this model's chat template hides the user's words, so it can't ask itself; give a file with --data")
    ids = tokenizer.encode(opening, add_special_tokens=False)
    params = [SamplingParams(max_tokens=LONGEST_QUESTION, temperature=1.0, top_p=0.95, seed=seed + n) for n in range(count)]
    outputs = llm.generate([{"prompt_token_ids": ids} for _ in range(count)], params, use_tqdm=show_progress)
    questions = [output.outputs[0].text.strip() for output in outputs if output.outputs[0].finish_reason == "stop"]
    return _prompts(tokenizer, dict.fromkeys(question for question in questions if question))


def _prompts(tokenizer: Tokenizer, questions: Sequence[str] | dict[str, None]) -> list[list[int]]:
    return [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
