"""A copy of a tokenizer in which text can't become a special token, unless the special token is asked for.

`encode("<|im_start|>")` has two meanings: the control token, in a chat template; and twelve characters, in what a user wrote.
The copy tells them apart inside one text: its special tokens are spelled with a sentinel in front, private-use characters drawn
at random, in the vocabulary itself. `SENTINEL<|im_start|>` is the control token, and `<|im_start|>` is ordinary text that
no part of the tokenizer (its Unigram trie, its merges) can match as a whole. Because the text is still encoded in
one go, everything else, normalisation and prefix spaces and splitting, is what the original does.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer as Backend


class TextOnlyEncoder:
    """Encodes text with every special token in it taken as text, except those that `protect` marked as control tokens."""

    def __init__(self, backend: Backend) -> None:
        spec = json.loads(backend.to_str())
        self._sentinel = "".join(chr(0x100000 + secrets.randbelow(0xFFFD)) for _ in range(3))
        self._specials = {token["content"] for token in spec["added_tokens"] if token["special"]}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._backend = Backend.from_str(json.dumps(self._rename(spec)))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Ids of `text`; only protected special tokens become control tokens."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def protect(self, text: str) -> str:
        """`text` with the sentinel before each special token: those that the caller knows to be real."""
        return self._pattern.sub(lambda match: self._sentinel + match[0], text)

    def _rename(self, spec: dict[str, Any]) -> dict[str, Any]:
        for token in spec["added_tokens"]:
            token["content"] = self._renamed(token["content"])
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._renamed(text): token_id for text, token_id in model["vocab"].items()}
        else:
            model["vocab"] = [[self._renamed(text), score] for text, score in model["vocab"]]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = self._renamed(model["unk_token"])
        if "merges" in model:
            model["merges"] = [merge for merge in map(_pair, model["merges"]) if self._specials.isdisjoint((*merge, "".join(merge)))]
        return spec

    def _renamed(self, text: str) -> str:
        return self._sentinel + text if text in self._specials else text


def _pair(merge: str | Iterable[str]) -> list[str]:
    """Merges were written as "a b" before tokenizers 0.20, as ["a", "b"] since."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)
