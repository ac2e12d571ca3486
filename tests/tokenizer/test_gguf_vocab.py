"""Vocabularies inside GGUF: SmolLM2's real one, and synthetic ones for each splitting rule, against the libraries that own them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import TEXTS, train_byte_level
from tokenizers import AddedToken, models, pre_tokenizers

from minfer.errors import ModelLoadError
from minfer.tokenizer import Tokenizer
from minfer.tokenizer.pretokenizers import PRE_TOKENIZATIONS


def byte_level_metadata(pre: str | None, specials: list[str], vocab_size: int = 500, **extra: Any) -> dict[str, Any]:
    """GGUF keys of a trained byte-level vocabulary."""
    spec = models_of(train_byte_level(specials, vocab_size))
    tokens = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["merges"]],
        "tokenizer.ggml.token_type": [3 if token in specials else 1 for token in tokens],
        **{f"tokenizer.ggml.{key}": value for key, value in extra.items()},
    }
    return metadata if pre is None else {**metadata, "tokenizer.ggml.pre": pre}


def models_of(backend: tokenizers.Tokenizer) -> dict[str, Any]:
    return json.loads(backend.to_str())["model"]


@pytest.fixture(scope="module")
def smollm2_reference(smollm2_metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """The recipe of SmolLM2's own tokenizer.json: single digits apart, then GPT-2's byte-level splitting."""
    tokens = smollm2_metadata["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in smollm2_metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    types = smollm2_metadata["tokenizer.ggml.token_type"]
    backend.add_special_tokens([AddedToken(token) for token, kind in zip(tokens, types, strict=True) if kind == 3])
    return backend


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_are_those_of_its_own_tokenizer(smollm2: Tokenizer, smollm2_reference: tokenizers.Tokenizer, text: str) -> None:
    ids = smollm2.encode(text)
    assert ids == smollm2_reference.encode(text).ids
    assert smollm2.decode(ids, skip_special_tokens=False) == text


def test_smollm2_random_text(smollm2: Tokenizer, smollm2_reference: tokenizers.Tokenizer) -> None:
    """Ids only: its vocabulary lacks some bytes of rare characters, which both tokenizers then drop."""

    @given(text=st.text(max_size=100))
    @settings(max_examples=300, deadline=None)
    def same(text: str) -> None:
        assert smollm2.encode(text) == smollm2_reference.encode(text).ids

    same()


def test_smollm2_ids_are_those_of_transformers_where_it_splits_alike(smollm2: Tokenizer, smollm2_transformers: Any) -> None:
    for text in TEXTS:
        if not any(char.isnumeric() for char in text):
            assert smollm2.encode(text) == smollm2_transformers(text, add_special_tokens=False)["input_ids"]


def test_smollm2_facts(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert smollm2.bos_token_id == 1
    assert smollm2.eos_token_ids[0] == 2
    assert 0 in smollm2.eos_token_ids  # <|endoftext|> ends a text too
    assert smollm2.is_special(2)
    assert not smollm2.is_special(1000)
    assert smollm2.token_text(2) == "<|im_end|>"
    assert smollm2.chat_template is not None
    assert smollm2.chat_template.startswith("{% for message in messages %}")


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZATIONS))
def test_splitting_rules_agree_with_transformers(pre: str) -> None:
    """For every name that transformers' own table has; its converter has no normalizer, so Qwen's NFC is tested below."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    if pre not in mapping.GGUF_PRE_TOKENIZER_SPLITS and pre not in ("gpt-2", "phi-2"):
        pytest.skip("transformers has no rule of its own under this name")
    metadata = byte_level_metadata(pre, ["<|end|>"])
    keys = {"tokenizer_type": "model", "pre_tokenizer_type": "pre", "tokens": "tokens", "merges": "merges", "token_type": "token_type"}
    described = {ours: metadata[f"tokenizer.ggml.{theirs}"] for ours, theirs in keys.items()}
    oracle, _ = mapping.convert_gguf_tokenizer("llama", described)
    tokenizer = Tokenizer.from_gguf_metadata({**metadata, "tokenizer.ggml.add_bos_token": False})
    for text in TEXTS:
        if not (PRE_TOKENIZATIONS[pre].nfc and "\u0301" in text):
            assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize(("pre", "name"), [("qwen2", "qwen2.tokenization_qwen2:Qwen2Tokenizer"), ("qwen35", "qwen3_5:Qwen3_5Tokenizer")])
def test_qwen_ids_are_those_of_qwen_s_own_class(pre: str, name: str) -> None:
    module, _, class_name = name.partition(":")
    models_module = pytest.importorskip(f"transformers.models.{module}")
    metadata = byte_level_metadata(pre, ["<|endoftext|>"])
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(line.split(" ")) for line in metadata["tokenizer.ggml.merges"]]
    oracle = getattr(models_module, class_name)(vocab=vocab, merges=merges)
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    for text in TEXTS:
        assert tokenizer.encode(text) == oracle(text, add_special_tokens=False)["input_ids"], text


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZATIONS))
def test_splitting_rules_agree_with_llama_cpp(pre: str) -> None:
    """The stored ids are llama.cpp's own, over merges that cross every boundary a rule could draw."""
    stored = json.loads(Path(__file__).with_name("llama_cpp_ids.json").read_text(encoding="utf-8"))
    keys = {f"tokenizer.ggml.{key}": stored[key] for key in ("tokens", "merges", "token_type")}
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False, **keys}
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    (expected,) = [rule["ids"] for rule in stored["ids"] if pre in rule["pre"]]
    for text, ids in zip(stored["texts"], expected, strict=True):
        if ids is not None:
            assert tokenizer.encode(text) == ids, text


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ModelLoadError, match="'unheard-of'"):
        Tokenizer.from_gguf_metadata(byte_level_metadata("unheard-of", []))


def test_user_defined_tokens_are_matched_but_not_hidden() -> None:
    metadata = byte_level_metadata("gpt-2", ["<|end|>", "<think>"])
    types = metadata["tokenizer.ggml.token_type"]
    think = metadata["tokenizer.ggml.tokens"].index("<think>")
    types[think] = 4
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.encode("a<think>")[-1] == think
    assert tokenizer.decode(tokenizer.encode("a<think>b<|end|>")) == "a<think>b"


@pytest.mark.parametrize(("add_bos", "pre", "expected"), [(None, "llama-bpe", True), (None, "gpt-2", False), (False, "llama-bpe", False)])
def test_bos_follows_the_flag_and_else_the_rule(add_bos: bool | None, pre: str, expected: bool) -> None:
    extra = {"bos_token_id": 0} | ({} if add_bos is None else {"add_bos_token": add_bos})
    tokenizer = Tokenizer.from_gguf_metadata(byte_level_metadata(pre, ["<|begin_of_text|>"], **extra))
    assert (tokenizer.encode("a")[0] == 0) is expected
    assert tokenizer.encode("a", add_special_tokens=False)[0] != 0


def test_every_way_to_end_a_turn_is_known() -> None:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
    tokenizer = Tokenizer.from_gguf_metadata(byte_level_metadata("llama-bpe", specials, bos_token_id=0, eos_token_id=1, eot_token_id=2))
    assert tokenizer.eos_token_ids == (1, 2, 3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "bert"}, "'bert'"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": ["a", "a"]}, "twice"),
        ({"token_type": [1]}, "token_type has 1 entries"),
        ({"merges": ["nospace"]}, "'nospace'"),
        ({"merges": ["a zzzz"]}, "doesn't fit"),
        ({"merges": 3}, "not an array"),
        ({"bos_token_id": 10**6}, "bos_token_id is 1000000"),
        ({"add_bos_token": True}, "no bos_token_id"),
        ({"add_eos_token": True}, "no eos_token_id"),
    ],
)
def test_damaged_metadata_is_explained(change: dict[str, Any], reason: str) -> None:
    metadata = byte_level_metadata("gpt-2", ["<|end|>"])
    for key, value in change.items():
        metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ModelLoadError, match=reason):
        Tokenizer.from_gguf_metadata(metadata)


def test_named_chat_templates_are_read() -> None:
    metadata = byte_level_metadata("gpt-2", ["<|end|>"])
    metadata |= {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = Tokenizer.from_gguf_metadata(metadata)
    assert tokenizer.chat_template == "plain"
    message = [{"role": "user", "content": "x"}]
    assert tokenizer.render_chat(message) == "plain"
    assert tokenizer.render_chat(message, tools=[{"type": "function"}]) == "tools"
