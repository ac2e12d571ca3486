"""Log-probabilities in the shapes of the two endpoints.

Both come from the same floats as the engine's choice, so that "was this token the greedy one?" (`lm-eval` asks it by comparing
a token's value with the maximum of its `top_logprobs`) has an exact answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minfer.engine.outputs import Logprob, PositionLogprobs
from minfer.tokenizer import Tokenizer

# JSON has no minus infinity; vLLM's stand-in.
LEAST = -9999.0


def chat_logprobs(tokenizer: Tokenizer | None, token_ids: Sequence[int], positions: Sequence[PositionLogprobs], k: int) -> dict[str, Any]:
    """One entry a token: its text, its bytes (a token may be part of a character), and the k most likely at its place."""
    content = []
    for token_id, position in zip(token_ids, positions, strict=True):
        best = [_chat_entry(tokenizer, other, score) for other, score in _ranked(position) if score.rank <= k]
        content.append({**_chat_entry(tokenizer, token_id, position[token_id]), "top_logprobs": best})
    return {"content": content}


def _chat_entry(tokenizer: Tokenizer | None, token_id: int, score: Logprob) -> dict[str, Any]:
    raw = None if tokenizer is None else list(tokenizer.token_bytes(token_id))
    return {"token": score.decoded_token, "logprob": _finite(score.logprob), "bytes": raw}


class CompletionLogprobs:
    """One sequence's `logprobs` of /v1/completions, made piece by piece: four parallel lists.

    `text_offset` is where a token begins in the choice's text. A token that adds nothing by itself (part of a character, a
    hidden special token) has the offset of what comes next.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, k: int, skip_special_tokens: bool, start: int = 0, prompt_ids: Sequence[int] = ()
    ) -> None:
        self.k = k
        self.offset = start
        self.detokenizer = None if tokenizer is None else tokenizer.detokenizer(prompt_ids, skip_special_tokens=skip_special_tokens)
        self.tokenizer = tokenizer

    def piece(self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]) -> dict[str, list[Any]]:
        """The lists for these tokens. A position of None is a token that nothing predicted: the prompt's first."""
        lists: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, position in zip(token_ids, positions, strict=True):
            lists["text_offset"].append(self.offset)
            if self.detokenizer is not None:
                self.offset += len(self.detokenizer.append((token_id,)))
            if position is None:
                text = "" if self.tokenizer is None else self.tokenizer.token_text(token_id)
                values: tuple[Any, ...] = (text, None, None)
            else:
                chosen = position[token_id]
                values = (chosen.decoded_token, _finite(chosen.logprob), self._top(token_id, position))
            for name, value in zip(("tokens", "token_logprobs", "top_logprobs"), values, strict=True):
                lists[name].append(value)
        return lists

    def _top(self, chosen: int, position: PositionLogprobs) -> dict[str, float]:
        """Text -> value of the k best and of the token itself. Where two tokens have the same text, the likelier one is told."""
        top: dict[str, float] = {}
        for token_id, score in _ranked(position):
            if score.rank <= self.k or token_id == chosen:
                top.setdefault(score.decoded_token, _finite(score.logprob))
        return top


def joined(first: dict[str, list[Any]], second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: first[name] + second[name] for name in first}


def plain_prompt_logprobs(positions: Sequence[PositionLogprobs | None] | None) -> list[dict[str, dict[str, Any]] | None] | None:
    """vLLM's extra field `prompt_logprobs`: by token id, with ranks."""
    if positions is None:
        return None
    return [None if position is None else {str(token): _plain(score) for token, score in position.items()} for position in positions]


def _plain(score: Logprob) -> dict[str, Any]:
    return {"logprob": _finite(score.logprob), "rank": score.rank, "decoded_token": score.decoded_token}


def _ranked(position: PositionLogprobs) -> list[tuple[int, Logprob]]:
    return sorted(position.items(), key=lambda item: item[1].rank)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
