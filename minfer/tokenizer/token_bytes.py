"""What bytes a token stands for: the one table that decoding, streaming and logprobs share.

A tokenizer's own `decode` works on a whole list of tokens, so streaming on top of it means decoding the same text again and
again and guessing which part of it is final. But nearly every decoder in use is a *per token* map to bytes followed by UTF-8:

- byte-level BPE (GPT-2, Llama 3, Qwen): each character of the token's text is one byte, in GPT-2's printable alphabet;
- SentencePiece (Llama 2, Mistral, Gemma): `▁` is a space and `<0xE4>` is one byte, and a space that opens the text is dropped.

So minfer reads the decoder out of the tokenizer once, as this map. Text is then `bytes -> UTF-8` and streaming is Python's own
incremental UTF-8 decoder: exact by construction and constant time per token.

Two deliberate differences from `tokenizers`' decode, both only for text that isn't valid or isn't ordinary: where byte tokens
form no valid UTF-8, that library turns the whole run into one U+FFFD a byte, here (as in Rust's and Python's decoders) only the
invalid part is replaced; and an added token is always its own text, even where its letters happen to lie in GPT-2's alphabet.

Left out: WordPiece, CTC and the other decoders that belong to models which don't generate text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tokenizers import Tokenizer as Backend

from minfer.errors import ModelLoadError

V = TypeVar("V")


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for their own byte, the other 68 bytes for U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


class _Table(dict[int, V]):
    """A dictionary that makes what it lacks: looking up what it has is one operation of the interpreter's."""

    def __init__(self, make: Callable[[int], V]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, token_id: int) -> V:
        made = self[token_id] = self._make(token_id)
        return made


@dataclass
class TokenBytes:
    """Maps an id to its bytes, as the tokenizer's decoder would; filled on demand, since a reply touches few of the ids.

    `drop_first` says what the decoder removes at the very start of a text: "" nothing, " " one space (SentencePiece's dummy
    prefix), "▁" every `▁` of the first token (the `Metaspace` decoder's own rule).
    """

    backend: Backend
    added: Mapping[int, str]
    alphabet: Mapping[str, int] | None
    replacements: tuple[tuple[str, str], ...]
    byte_fallback: bool
    drop_first: str
    # Made as they are asked. An id that the tokenizer doesn't know is b""; one that isn't made of whole characters has no text of its own.
    table: dict[int, bytes] = field(init=False)
    texts: dict[int, str | None] = field(init=False)

    def __post_init__(self) -> None:
        self.table = _Table(self._compute)
        self.texts = _Table(self._text)

    @classmethod
    def from_backend(cls, backend: Backend, source: str) -> TokenBytes:
        """Read the decoder of `backend`; `source` names the file in the error for a decoder that isn't a map of tokens."""
        steps = _decoder_steps(backend)
        added = {id_: token.content for id_, token in backend.get_added_tokens_decoder().items()}
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return cls(backend, added, byte_alphabet(), (), False, "")
        if [step["type"] for step in steps] == ["Metaspace"]:
            mark = str(steps[0].get("replacement", "▁"))
            never = steps[0].get("prepend_scheme", "always") == "never"
            return cls(backend, added, None, ((mark, " "),), False, "" if never else mark)
        replacements: list[tuple[str, str]] = []
        byte_fallback, drop_first = False, ""
        for position, step in enumerate(steps):
            last = position == len(steps) - 1
            if step["type"] == "Replace" and "String" in step["pattern"]:
                replacements.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "ByteFallback":
                byte_fallback = True
            elif step["type"] == "Strip" and last and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
                drop_first = " "
            elif step["type"] != "Fuse":
                raise ModelLoadError(f"{source}: the decoder step {step!r} of this tokenizer isn't supported.")
        if not steps:
            raise ModelLoadError(f"{source}: this tokenizer has no decoder, so its tokens can't be turned into text.")
        return cls(backend, added, None, tuple(replacements), byte_fallback, drop_first)

    def __call__(self, token_id: int) -> bytes:
        """The bytes of one token; b"" for an id that the tokenizer doesn't know (a padding row of the model's vocabulary)."""
        return self.table[token_id]

    def first(self, token_id: int) -> bytes:
        """The bytes of a token that opens a text, where `Metaspace` drops all of the token's spaces."""
        if self.drop_first in ("", " "):
            return self(token_id)
        text = self.added.get(token_id) or self.backend.id_to_token(token_id) or ""
        return text.replace(self.drop_first, "").encode()

    def _text(self, token_id: int) -> str | None:
        try:
            return self.table[token_id].decode()
        except UnicodeDecodeError:
            return None

    def _compute(self, token_id: int) -> bytes:
        text = self.added.get(token_id)
        is_added = text is not None
        if text is None:
            text = self.backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if text is None:
            return b""
        if self.alphabet is not None:
            if is_added or not all(char in self.alphabet for char in text):
                return text.encode()
            return bytes(self.alphabet[char] for char in text)
        for old, new in self.replacements:
            text = text.replace(old, new)
        if self.byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            try:
                return bytes([int(text[3:5], 16)])
            except ValueError:
                return text.encode()
        return text.encode()


def _decoder_steps(backend: Backend) -> list[dict[str, Any]]:
    """The decoder as a flat list of steps, each the JSON object that `tokenizer.json` would hold for it."""
    if backend.decoder is None:
        return []
    spec = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    return steps
