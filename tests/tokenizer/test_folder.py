"""Checkpoint folders: every place where the facts about a tokenizer may stand, and every way for the files to be damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_samples import TEXTS, train_byte_level, train_llama_like, train_sentencepiece
from tokenizers import processors

from minfer.errors import ModelLoadError
from minfer.tokenizer import Tokenizer

SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
SaveFolder = Callable[..., Path]


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True, "add_eos_token": True}])
@pytest.mark.parametrize("own_bos", [False, True])
@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace"])
def test_ids_are_those_of_transformers(save_folder: SaveFolder, kind: str, own_bos: bool, config: dict[str, Any]) -> None:
    """Also with flags in the config, which don't count beside a tokenizer.json."""
    transformers = pytest.importorskip("transformers")
    backend = train_byte_level(SPECIALS) if kind == "byte_level" else train_llama_like("normalizer" if kind == "llama" else kind)
    bos, eos = SPECIALS[:2] if kind == "byte_level" else ("<s>", "</s>")
    if own_bos:
        specials = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=specials)
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": {"content": eos}, **config}
    folder = save_folder(backend, tokenizer_config={**described, "eos_token": eos})
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.from_folder(save_folder(backend, tokenizer_config=described))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (oracle.bos_token_id, (oracle.eos_token_id,))
    assert tokenizer.vocab_size == len(oracle)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == oracle(text)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == oracle(text, add_special_tokens=False)["input_ids"]
        for skip in (True, False):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


def test_tokens_that_only_the_config_lists(save_folder: SaveFolder) -> None:
    transformers = pytest.importorskip("transformers")
    backend = train_byte_level(SPECIALS)
    size = backend.get_vocab_size()
    added = {
        str(size): {"content": "<|tool|>", "special": True, "lstrip": False, "rstrip": True, "normalized": False, "single_word": False},
        "2": {"content": "<|eot_id|>", "special": False, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": added, "pad_token": "<|pad|>"}
    folder = save_folder(backend, tokenizer_config=config)
    tokenizer, oracle = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    text = "a<|tool|>  b<|eot_id|>c<|pad|>"
    assert tokenizer.encode(text) == oracle(text)["input_ids"]
    assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(oracle(text)["input_ids"], skip_special_tokens=True)
    assert tokenizer.is_special(size)
    assert tokenizer.is_special(2)
    assert tokenizer.vocab_size == len(oracle) == size + 2


def test_a_token_with_another_id_than_listed_is_refused(save_folder: SaveFolder) -> None:
    config = {"added_tokens_decoder": {"9999": {"content": "<|tool|>", "special": True}}}
    with pytest.raises(ModelLoadError, match=r"should have id 9999"):
        Tokenizer.from_folder(save_folder(train_byte_level(SPECIALS), tokenizer_config=config))


def test_truncation_and_padding_of_the_training_run_are_dropped(save_folder: SaveFolder) -> None:
    backend = train_byte_level(SPECIALS)
    backend.enable_truncation(5)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_folder(save_folder(backend))
    assert tokenizer.decode(tokenizer.encode("a longer text than five tokens")) == "a longer text than five tokens"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [2, 1]}}, (2, 1)),
        ({"generation_config": {"eos_token_id": 2}, "config": {"eos_token_id": [1]}}, (2, 1)),
        ({"config": {"eos_token_id": 2}}, (2, 1)),
        ({"special_tokens_map": {"eos_token": {"content": "<|eot_id|>"}}, "tokenizer_config": {}}, (2,)),
        ({"generation_config": {"eos_token_id": None}}, (1,)),
    ],
)
def test_every_end_token_is_found(save_folder: SaveFolder, files: dict[str, Any], expected: tuple[int, ...]) -> None:
    files = {"tokenizer_config": {"eos_token": "<|end_of_text|>"}, **files}
    assert Tokenizer.from_folder(save_folder(train_byte_level(SPECIALS), **files)).eos_token_ids == expected


def test_the_newest_place_of_a_chat_template_wins(save_folder: SaveFolder, tmp_path: Path) -> None:
    backend = train_byte_level(SPECIALS)
    folder = save_folder(backend, tokenizer_config={"chat_template": "in the config"})
    assert Tokenizer.from_folder(folder).chat_template == "in the config"
    save_folder(backend, chat_template={"chat_template": "in json"})
    assert Tokenizer.from_folder(folder).chat_template == "in json"
    (tmp_path / "chat_template.jinja").write_text("in a file", encoding="utf-8")
    assert Tokenizer.from_folder(folder).chat_template == "in a file"


def test_named_templates(save_folder: SaveFolder) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = Tokenizer.from_folder(save_folder(train_byte_level(SPECIALS), tokenizer_config={"chat_template": named}))
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.chat_template == "plain"
    assert tokenizer.render_chat(messages) == "plain"
    assert tokenizer.render_chat(messages, tools=[]) == "plain"
    assert tokenizer.render_chat(messages, tools=[{"type": "function"}]) == "tools"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", b"{", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json: not a tokenizer.json"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: it holds a list"),
        ("tokenizer_config.json", b"{,", "tokenizer_config.json: not a JSON file"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json: not a JSON file"),
        ("tokenizer_config.json", b'{"eos_token": "<nowhere>", "added_tokens_decoder": [1]}', "added_tokens_decoder is damaged"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "y"}}}', "added_tokens_decoder is damaged"),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}', "list without names"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("chat_template.jinja", b"\xff", "template file can't be read"),
    ],
)
def test_damaged_files_are_named(save_folder: SaveFolder, name: str, content: bytes, reason: str) -> None:
    folder = save_folder(train_byte_level(SPECIALS))
    (folder / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=reason):
        Tokenizer.from_folder(folder)


def test_an_empty_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json and no tokenizer\.model"):
        Tokenizer.from_folder(tmp_path)


def test_a_decoder_that_is_no_map_of_tokens_is_refused(save_folder: SaveFolder) -> None:
    backend = train_byte_level(SPECIALS)
    spec = json.loads(backend.to_str())
    spec["decoder"] = {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}
    folder = save_folder()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(ModelLoadError, match="decoder step"):
        Tokenizer.from_folder(folder)


def test_code_in_a_checkpoint_is_never_run(save_folder: SaveFolder) -> None:
    folder = save_folder(train_byte_level(SPECIALS), tokenizer_config={"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    (folder / "evil.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    assert Tokenizer.from_folder(folder).encode("a")


def test_sentencepiece_file_with_config_beside_it(save_folder: SaveFolder) -> None:
    folder = save_folder(tokenizer_config={"add_bos_token": False, "eos_token": "</s>", "chat_template": "x"})
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(model_type="bpe", byte_fallback=True))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.encode("a")[0] != tokenizer.bos_token_id
    assert tokenizer.chat_template == "x"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_ids[0]
    save_folder(tokenizer_config={"add_eos_token": True})
    ids = Tokenizer.from_folder(folder).encode("a")
    assert (ids[0], ids[-1]) == (bos, eos)
