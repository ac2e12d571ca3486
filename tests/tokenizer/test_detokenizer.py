"""The streaming law: pieces joined equal the whole decode, for any ids and any cutting; and decode is what `tokenizers` decodes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import TEXTS, train_byte_level, train_llama_like

from minfer.tokenizer import IncrementalDetokenizer, Tokenizer
from minfer.tokenizer.source import TokenizerSource
from minfer.tokenizer.token_bytes import byte_alphabet

BACKENDS = {
    "byte_level": train_byte_level(["<|endoftext|>", "<|im_start|>"]),
    "llama": train_llama_like(),
    "metaspace": train_llama_like("metaspace"),
}
TOKENIZERS = {name: Tokenizer(TokenizerSource(backend, None, (), {})) for name, backend in BACKENDS.items()}
KINDS = st.sampled_from(sorted(TOKENIZERS))


def cut(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """`ids` in consecutive groups of the sizes `cuts`, used over and over."""
    groups, position, turn = [], 0, 0
    while position < len(ids):
        size = cuts[turn % len(cuts)]
        groups.append(ids[position : position + size])
        position, turn = position + size, turn + 1
    return groups


@given(kind=KINDS, ids=st.lists(st.integers(0, 720), max_size=60), cuts=st.lists(st.integers(1, 5), min_size=1), skip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_pieces_join_to_the_whole_decode(kind: str, ids: list[int], cuts: list[int], skip: bool) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = tokenizer.detokenizer(skip_special_tokens=skip)
    pieces = [stream.append(group) for group in cut(ids, cuts)] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(kind=KINDS, prompt=st.lists(st.integers(0, 720), max_size=4), ids=st.lists(st.integers(0, 720), max_size=40), skip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_one_token_at_a_time_is_the_same(kind: str, prompt: list[int], ids: list[int], skip: bool) -> None:
    """`next` takes a short cut where a token is whole characters and nothing is held back: piece by piece what `append` gives."""
    one, several = (TOKENIZERS[kind].detokenizer(prompt, skip_special_tokens=skip) for _ in range(2))
    assert [one.next(token) for token in ids] == [several.append([token]) for token in ids]
    assert one.finish() == several.finish()


@given(kind=KINDS, text=st.text(max_size=80), skip=st.booleans())
@settings(max_examples=400, deadline=None)
def test_decode_and_encode_agree_with_the_library(kind: str, text: str, skip: bool) -> None:
    ids = TOKENIZERS[kind].encode(text)
    assert ids == BACKENDS[kind].encode(text).ids
    assert TOKENIZERS[kind].decode(ids, skip_special_tokens=skip) == BACKENDS[kind].decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, 500), max_size=40))
@settings(max_examples=300, deadline=None)
def test_invalid_bytes_decode_as_in_the_library_for_byte_level_vocabularies(ids: list[int]) -> None:
    assert TOKENIZERS["byte_level"].decode(ids) == BACKENDS["byte_level"].decode(ids)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_part_of_a_character(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = tokenizer.detokenizer()
    pieces = [stream.append([token]) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""


def test_an_incomplete_character_is_held_back_and_flushed_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("🚀")
    assert len(ids) == 4
    stream = tokenizer.detokenizer()
    assert [stream.append([token]) for token in ids[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd" == tokenizer.decode(ids[:3])


def test_a_prompt_keeps_the_space_before_the_first_new_word() -> None:
    tokenizer = TOKENIZERS["llama"]
    prompt, new = tokenizer.encode("Hello"), tokenizer.encode("world")
    assert tokenizer.detokenizer(prompt).append(new) == " world"
    assert tokenizer.detokenizer().append(new) == "world"


def test_a_prompt_of_special_tokens_alone_is_no_text() -> None:
    tokenizer = TOKENIZERS["llama"]
    bos = BACKENDS["llama"].token_to_id("<s>")
    assert tokenizer.detokenizer([bos]).append(tokenizer.encode("world")) == "world"


def test_a_character_begun_by_the_prompt_is_completed() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("abc🚀d")
    for split in range(len(ids)):
        prompt, new = ids[:split], ids[split:]
        stream = tokenizer.detokenizer(prompt)
        done = tokenizer.decode(prompt).rstrip("\ufffd")
        assert done + stream.append(new) + stream.finish() == "abc🚀d"


def test_unknown_ids_are_empty_and_special_ones_can_be_shown() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    assert tokenizer.decode([10**6, -1, 2**40]) == ""
    ids = tokenizer.encode("<|im_start|>a")
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a"


def test_cost_per_token_does_not_grow_with_the_text() -> None:
    """Counted, not timed: the detokenizer asks for each new token's bytes once and keeps at most three of them."""
    asked: list[int] = []

    class Counting:
        drop_first = ""

        def __call__(self, token_id: int) -> bytes:
            asked.append(token_id)
            return "你".encode()[token_id % 3 : token_id % 3 + 1]

        first = __getitem__ = __call__

        @property
        def table(self) -> Counting:
            return self

    stream = IncrementalDetokenizer(Counting())  # type: ignore[arg-type]
    text = "".join(stream.append([token]) for token in range(3000))
    assert text == "你" * 1000
    assert asked == list(range(3000))


def test_byte_alphabet_is_the_library_s() -> None:
    from tokenizers import pre_tokenizers

    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
