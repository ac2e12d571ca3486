"""Texts and trained tokenizers for this room's tests, made by their owners' code: `tokenizers` and `sentencepiece`."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 2024, and we've counted 1,234,567 foxes!",
    "def add(a, b):\n    return a + b\n\n\tif x >= 10 and y != 3:\n        print('hello world')",
    "Größe, naïve café, señor, œuvre; Привет, мир! Как дела? Καλημέρα κόσμε.",
    "你好，世界。我想在苹果公司工作。こんにちは世界。안녕하세요 세계.",
    "Numbers 0 12 345 6789, punctuation ... ?! -- (a) [b] {c} <d> \"e\" 'f', spaces   and    tabs\t\t.",
    "Sphinx of black quartz, judge my vow. The vow of the sphinx is black, the quartz is not.",
]

TEXTS = [
    "",
    " ",
    "a",
    "Hello world",
    "  two leading spaces, and trailing  ",
    "line one\nline two\n\n\nline five\r\n\ttabbed",
    "It's we've I'LL 'tis DON'T can't",
    "0 1 12 123 1234 12345 3.14159 1,000,000 ½ ² Ⅷ ٣",
    "你好，世界 こんにちは 안녕하세요 ไทย हिन्दी",
    "e\u0301 é Å \u212b \ufb01 fi",
    "👩‍👩‍👧‍👦 🚀🚀 😶‍🌫️ flags 🇩🇪",
    "(a) [b] {c} <d> -- ... !? $x^2+y_1=~|z|` #tag @user 50%",
    "x" * 60 + " " * 30 + "y",
    "CamelCaseHTTPServer snake_case kebab-case path/to/file.py",
    "\u00a0nbsp\u2003em\u3000ideographic\u200bzero",
    "<0x41> ▁ Ġ <unk> <s> </s> <|im_start|> <|eot_id|>",
    "\x00\x01\x7f\x80 control",
]


def train_byte_level(specials: list[str], vocab_size: int = 500) -> tokenizers.Tokenizer:
    """A small GPT-2-like tokenizer; few merges, so that characters beyond ASCII are spread over several tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return backend


def train_llama_like(prefix: str = "normalizer", specials: tuple[str, ...] = ("<s>", "</s>")) -> tokenizers.Tokenizer:
    """A BPE with byte fallback and Llama-2's normalizer ("normalizer") or the newer Metaspace with scheme "first"."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *specials, *bytes_], show_progress=False, limit_alphabet=90, max_token_length=8
    )
    backend.train_from_iterator(CORPUS, trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def train_sentencepiece(**options: Any) -> bytes:
    """A serialized SentencePiece model, trained by sentencepiece itself on a text long enough for it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    settings: dict[str, Any] = {"vocab_size": 600, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1, **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS * 3), model_writer=model, **settings)
    return model.getvalue()
