"""Tokens to text while they arrive, never half a character.

One token may be a third of a Chinese character or a quarter of an emoji, so a token's text can't be shown on its own. Here each
token's bytes go through Python's UTF-8 decoder, which leaves an incomplete tail (three bytes at most) alone until
it is complete or known to be invalid. Nothing is decoded twice and nothing that was emitted is taken back.

The law (a property test holds it for random ids): the pieces joined, `finish()` included, equal `Tokenizer.decode` of all ids.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence

from minfer.tokenizer.token_bytes import TokenBytes

_MAX_CHARACTER_BYTES = 4


class IncrementalDetokenizer:
    """Turns a growing list of ids into text. One per sequence; about a microsecond a token, whatever the length so far.

    With `prompt_ids` the pieces continue that prompt: a leading space of the first new token is kept (it separates words), and
    a character that the prompt's last tokens began is emitted when new tokens complete it. Without, the pieces are a text of
    their own, as `decode` of the new ids alone.
    """

    def __init__(self, token_bytes: TokenBytes, *, skip_ids: Collection[int] = (), prompt_ids: Sequence[int] = ()) -> None:
        self._token_bytes = token_bytes
        self._skip_ids = skip_ids
        self._incomplete = b""  # the tail that may become a character
        self._settled = False  # nothing that came before has a say in what the next token's bytes mean
        self._at_start = True  # no token has counted yet: the next is the first of the text
        self._drop_space = token_bytes.drop_first == " "
        self._prime(prompt_ids)

    def next(self, token_id: int) -> str:
        """`append` of one id, which is what every stream asks for at every step."""
        if self._settled and token_id not in self._skip_ids:
            text = self._token_bytes.texts[token_id]
            if text is not None:
                return text
        return self.append((token_id,))

    def append(self, ids: Iterable[int]) -> str:
        """The text that these ids make printable; "" while the tail may still be part of a character."""
        skip, table = self._skip_ids, self._token_bytes.table
        if not self._at_start:
            return self._emit(b"".join([table[token_id] for token_id in ids if token_id not in skip]), final=False)
        counted = [token_id for token_id in ids if token_id not in skip]
        if not counted:
            return ""
        self._at_start = False
        return self._emit(self._token_bytes.first(counted[0]) + b"".join([table[token_id] for token_id in counted[1:]]), final=False)

    def finish(self) -> str:
        """The rest: U+FFFD where the last tokens left a character incomplete, else "". Call once, at the end."""
        return self._emit(b"", final=True)

    def _emit(self, data: bytes, *, final: bool) -> str:
        if self._incomplete:
            data = self._incomplete + data
        text, read = codecs.utf_8_decode(data, "replace", final)
        self._incomplete = data[read:]
        if self._drop_space and text:
            self._drop_space = False
            text = text.removeprefix(" ")
        self._settled = not self._incomplete and not self._drop_space
        return text

    def _prime(self, prompt_ids: Sequence[int]) -> None:
        """Start where the prompt left off: only its last few bytes can still matter."""
        tail = b""
        for token_id in reversed(prompt_ids):
            if len(tail) >= _MAX_CHARACTER_BYTES:
                break
            if token_id not in self._skip_ids:
                tail = self._token_bytes(token_id) + tail
                self._at_start = False
        if tail:
            self._drop_space = False
            self._emit(tail, final=False)
