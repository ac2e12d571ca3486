"""`parse_special=False`: nothing in a text becomes a control token, and everything else is tokenised as before."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import TEXTS, train_byte_level, train_llama_like

from minfer.errors import RequestError
from minfer.tokenizer import Tokenizer
from minfer.tokenizer.source import TokenizerSource
from minfer.tokenizer.text_only import TextOnlyEncoder

BACKENDS = {
    "byte_level": train_byte_level(["<|endoftext|>", "<|im_start|>", "<s>", "</s>"]),
    "llama": train_llama_like(),
    "metaspace": train_llama_like("metaspace"),
}
TOKENIZERS = {name: Tokenizer(TokenizerSource(backend, None, (), {})) for name, backend in BACKENDS.items()}
PLAIN = {name: TextOnlyEncoder(backend) for name, backend in BACKENDS.items()}
HOSTILE = st.lists(st.sampled_from(["<s>", "</s>", "<|im_start|>", "<unk>", "<", "s>", "vow", " ", "\n", "你"]), max_size=12).map("".join)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@given(text=HOSTILE)
@settings(max_examples=200, deadline=None)
def test_no_control_token_and_the_same_text(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text, parse_special=False)
    assert not any(tokenizer.is_special(token_id) for token_id in ids)
    assert tokenizer.decode(ids) in (text, text.removeprefix(" "))  # Metaspace "first" adds no space to a text that has one


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@given(text=HOSTILE)
@settings(max_examples=200, deadline=None)
def test_protected_control_tokens_give_the_ordinary_ids(kind: str, text: str) -> None:
    encoder = PLAIN[kind]
    assert encoder.encode(encoder.protect(text), add_special_tokens=False) == BACKENDS[kind].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("text", [text for text in TEXTS if "<s>" not in text])
def test_text_without_special_tokens_is_the_same_either_way(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.encode(text, parse_special=False) == tokenizer.encode(text)


def test_a_merge_that_would_build_a_control_token_is_left_out() -> None:
    """A vocabulary in which ordinary merges reach a special token's text must not reach the token from text."""
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE({"<": 0, "s": 1, ">": 2, "<s": 3, "<s>": 4}, [("<", "s"), ("<s", ">")]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    tokenizer = Tokenizer(TokenizerSource(backend, None, (), {}))
    assert tokenizer.encode("<s>") == [4]
    assert tokenizer.encode("<s>", parse_special=False) == [3, 2]


def test_lone_surrogates_are_the_caller_s_fault() -> None:
    for parse in (True, False):
        with pytest.raises(RequestError, match="lone surrogate at position 2"):
            TOKENIZERS["byte_level"].encode("ab\ud800", parse_special=parse)
