"""Bytes and readable text of single tokens, as logprobs report them."""

from __future__ import annotations

import pytest
from tokenizer_samples import TEXTS, train_byte_level, train_llama_like
from tokenizers import AddedToken

from minfer.tokenizer import Tokenizer
from minfer.tokenizer.source import TokenizerSource


@pytest.fixture(params=["byte_level", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend = train_byte_level(["<|endoftext|>"]) if request.param == "byte_level" else train_llama_like()
    return Tokenizer(TokenizerSource(backend, None, (), {}))


@pytest.mark.parametrize("text", [text for text in TEXTS if "<s>" not in text])
def test_the_tokens_of_a_text_join_to_its_bytes(tokenizer: Tokenizer, text: str) -> None:
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in tokenizer.encode(text)).decode()
    dummy_space = tokenizer.token_bytes(tokenizer.encode("a")[0]).startswith(b" ")
    assert joined == (" " + text if dummy_space and text else text)


def test_part_of_a_character_is_shown_as_bytes() -> None:
    tokenizer = Tokenizer(TokenizerSource(train_byte_level(["<|endoftext|>"]), None, (), {}))
    ids = tokenizer.encode("🚀")
    assert [tokenizer.token_text(token_id) for token_id in ids] == ["\\xf0", "\\x9f", "\\x9a", "\\x80"]
    assert b"".join(map(tokenizer.token_bytes, ids)) == "🚀".encode()


def test_special_and_unknown_tokens() -> None:
    tokenizer = Tokenizer(TokenizerSource(train_byte_level(["<|endoftext|>"]), None, (), {}))
    assert tokenizer.token_text(0) == "<|endoftext|>"
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"
    assert tokenizer.token_text(tokenizer.vocab_size) == ""
    assert tokenizer.token_bytes(-1) == b""


def test_an_added_token_is_its_own_text_even_in_letters_of_the_byte_alphabet() -> None:
    """`tokenizers` decodes it to the single byte 0xE9, which is no UTF-8; the token says é."""
    backend = train_byte_level(["<|endoftext|>"])
    backend.add_tokens([AddedToken("é", normalized=False)])
    tokenizer = Tokenizer(TokenizerSource(backend, None, (), {}))
    assert tokenizer.decode(tokenizer.encode("é")) == "é"


def test_only_the_invalid_bytes_are_replaced() -> None:
    tokenizer = Tokenizer(TokenizerSource(train_llama_like(), None, (), {}))
    ids = [next(i for i in range(300) if tokenizer.token_bytes(i) == bytes([byte])) for byte in "ไ".encode() + b"\xff"]
    assert tokenizer.decode(ids) == "ไ\ufffd"
