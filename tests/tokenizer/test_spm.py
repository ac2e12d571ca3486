"""SentencePiece models, as a file and as GGUF pieces: the same ids as the sentencepiece library, which trained them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import TEXTS, train_sentencepiece

from minfer.errors import ModelLoadError
from minfer.tokenizer import Tokenizer
from minfer.tokenizer.spm import parse_model

# The control tokens' own texts are special tokens for us and plain characters for sentencepiece (see test_text_only).
PLAIN_TEXTS = [text for text in TEXTS if "<s>" not in text]
LLAMA: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "split_digits": True, **LLAMA},
    "llama_whitespace_pieces": {"model_type": "bpe", "allow_whitespace_only_pieces": True, **LLAMA},
    "gemma": {"model_type": "bpe", "add_dummy_prefix": False, **LLAMA},
    "bpe_nfkc": {"model_type": "bpe", "byte_fallback": True},
    "bpe_without_bytes": {"model_type": "bpe", "character_coverage": 0.98},
    "unigram": {"model_type": "unigram", "vocab_size": 450, **LLAMA},
    "unigram_nfkc": {"model_type": "unigram", "vocab_size": 450, "byte_fallback": True},
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tokenizer]:
    """The library's own processor, and ours, of one model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    data = train_sentencepiece(**MODELS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "tokenizer.model").write_bytes(data)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=data)
    oracle.name = request.param
    return oracle, Tokenizer.from_folder(folder)


def assert_same(oracle: Any, ids: list[int], text: str) -> None:
    """Equal ids; a Unigram model may have two best segmentations (". .." and ".. ."), of which either will do."""
    expected = oracle.encode(text)
    if ids != expected:
        assert "unigram" in oracle.name
        assert oracle.decode(ids) == oracle.decode(expected)
        assert sum(map(oracle.get_score, ids)) == pytest.approx(sum(map(oracle.get_score, expected)), abs=1e-5)


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_ids_and_text_are_sentencepiece_s(trained: tuple[Any, Tokenizer], text: str) -> None:
    oracle, tokenizer = trained
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert_same(oracle, ids, text)
    if oracle.unk_id() not in ids:
        assert tokenizer.decode(ids) == oracle.decode(ids)


def test_random_text(trained: tuple[Any, Tokenizer]) -> None:
    oracle, tokenizer = trained
    alphabet = st.sampled_from("  aábcdeghlnoqrstuwxyzTHQ0123,.()\n\té你好🚀")

    @given(text=st.text(alphabet=alphabet, max_size=60))
    @settings(max_examples=300, deadline=None)
    def same(text: str) -> None:
        assert_same(oracle, tokenizer.encode(text, add_special_tokens=False), text)

    same()


def test_facts_of_the_model(trained: tuple[Any, Tokenizer]) -> None:
    oracle, tokenizer = trained
    assert tokenizer.vocab_size == oracle.get_piece_size()
    assert tokenizer.bos_token_id == oracle.bos_id()
    assert tokenizer.eos_token_ids == (oracle.eos_id(),)
    assert tokenizer.encode("a")[0] == oracle.bos_id()
    for token_id in range(oracle.get_piece_size()):
        assert tokenizer.is_special(token_id) == (oracle.is_control(token_id) or oracle.is_unknown(token_id))


@pytest.fixture(scope="module")
def llama_gguf() -> tuple[Any, dict[str, Any]]:
    """GGUF keys of a Llama-like model, written as llama.cpp's converter does: from the library's own accessors."""
    sentencepiece = pytest.importorskip("sentencepiece")
    oracle = sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece(**MODELS["llama"]))
    ids = range(oracle.get_piece_size())
    types = [2 if oracle.is_unknown(i) else 3 if oracle.is_control(i) else 6 if oracle.is_byte(i) else 1 for i in ids]
    return oracle, {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [oracle.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [oracle.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": oracle.bos_id(),
        "tokenizer.ggml.eos_token_id": oracle.eos_id(),
    }


def test_gguf_ids_are_sentencepiece_s(llama_gguf: tuple[Any, dict[str, Any]]) -> None:
    oracle, metadata = llama_gguf
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    for text in PLAIN_TEXTS:
        assert tokenizer.encode(text) == [oracle.bos_id(), *oracle.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(oracle.encode(text))


def test_gguf_without_a_prefix_space(llama_gguf: tuple[Any, dict[str, Any]]) -> None:
    oracle, metadata = llama_gguf
    tokenizer = Tokenizer.from_gguf_metadata({**metadata, "tokenizer.ggml.add_space_prefix": False})
    # Inside a text, after a newline, sentencepiece adds no prefix either: compare from there.
    newline = oracle.encode("\n")
    assert ["\n", *map(tokenizer.token_text, tokenizer.encode("vow", add_special_tokens=False))][1:] == [
        oracle.decode([piece]) for piece in oracle.encode("\nvow")[len(newline) :]
    ]
    assert tokenizer.decode(tokenizer.encode(" vow")) == " vow"


def test_gguf_without_scores_is_explained(llama_gguf: tuple[Any, dict[str, Any]]) -> None:
    metadata = {key: value for key, value in llama_gguf[1].items() if not key.endswith("scores")}
    with pytest.raises(ModelLoadError, match=r"tokenizer\.ggml\.scores is missing"):
        Tokenizer.from_gguf_metadata(metadata)


def test_text_after_a_special_token_begins_with_a_space_as_in_llama_2(llama_gguf: tuple[Any, dict[str, Any]]) -> None:
    oracle, metadata = llama_gguf
    ids = Tokenizer.from_gguf_metadata(metadata).encode("</s>vow", add_special_tokens=False)
    assert ids == [oracle.eos_id(), *oracle.encode("vow")]


@given(cut=st.integers(0, 4000), flip=st.integers(0, 4000), byte=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_explained(damaged: tuple[bytes, Path], cut: int, flip: int, byte: int) -> None:
    """Truncated and altered files either still hold a vocabulary or give a ModelLoadError, never another."""
    data, folder = damaged
    altered = bytearray(data[: len(data) - cut])
    altered[flip % len(altered)] = byte
    (folder / "tokenizer.model").write_bytes(bytes(altered))
    with contextlib.suppress(ModelLoadError):
        Tokenizer.from_folder(folder).encode("vow")


def test_a_file_cut_in_the_middle_is_named(damaged: tuple[bytes, Path]) -> None:
    data, folder = damaged
    (folder / "tokenizer.model").write_bytes(data[: len(data) // 2 + 1])
    with pytest.raises(ModelLoadError, match=r"tokenizer\.model: not a SentencePiece model, or a damaged one"):
        Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    return train_sentencepiece(**MODELS["llama"]), tmp_path_factory.mktemp("damaged")


def test_kinds_that_can_not_be_converted_are_refused() -> None:
    with pytest.raises(ValueError, match="neither BPE nor Unigram"):
        parse_model(train_sentencepiece(model_type="char"))
    with pytest.raises(ValueError, match="spaces in front"):
        parse_model(train_sentencepiece(model_type="bpe", treat_whitespace_as_suffix=True))
