"""The tokenizer of a folder in Hugging Face layout.

`tokenizer.json` is the tokenizer itself; where it is missing, SentencePiece's `tokenizer.model` is. The files beside it add what
neither holds: which tokens begin and end a text (`tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
`config.json`) and the chat template, which has lived in four places over the years.

Left out: slow tokenizers with code of their own (`auto_map` is never followed) and `vocab.json` + `merges.txt` without a
`tokenizer.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from minfer.errors import ModelLoadError
from minfer.tokenizer.source import TokenizerSource, add_tokens, set_bos_eos
from minfer.tokenizer.spm import read_sentencepiece

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_folder(folder: Path) -> TokenizerSource:
    """Read the tokenizer of a checkpoint folder. Raises ModelLoadError naming the file and what is wrong with it."""
    config = {**_json_object(folder / "special_tokens_map.json"), **_json_object(folder / "tokenizer_config.json")}
    if (folder / "tokenizer.json").is_file():
        source = TokenizerSource(_load_backend(folder / "tokenizer.json"), None, (), {}, origin=str(folder / "tokenizer.json"))
        adds_own_tokens = True  # its post-processor decides about BOS and EOS; the flags in the config are older
    elif (folder / "tokenizer.model").is_file():
        source = read_sentencepiece(folder / "tokenizer.model")
        adds_own_tokens = False
    else:
        raise ModelLoadError(f"{folder}: there is no tokenizer.json and no tokenizer.model.")
    backend = source.backend
    _add_configured_tokens(backend, folder, config)
    texts = {**source.special_texts, **{name: text for name in SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None}}
    ids = {name: backend.token_to_id(text) for name, text in texts.items()}
    for name in ("bos_token", "eos_token"):
        if name in texts and ids[name] is None:
            raise ModelLoadError(f"{folder / 'tokenizer_config.json'}: {name} {texts[name]!r} is not in the vocabulary.")
    bos, eos = ids.get("bos_token"), ids.get("eos_token")
    if not adds_own_tokens:
        first = (texts["bos_token"], bos) if config.get("add_bos_token", True) and bos is not None else None
        last = (texts["eos_token"], eos) if config.get("add_eos_token", False) and eos is not None else None
        set_bos_eos(backend, first, last)
    return replace(
        source,
        bos_token_id=bos,
        eos_token_ids=_end_ids(folder, eos),
        special_texts=texts,
        chat_templates=_chat_templates(folder, config),
    )


def _load_backend(path: Path) -> Backend:
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # `tokenizers` raises plain Exception for a file that it can't read or parse
        raise ModelLoadError(f"{path}: not a tokenizer.json, or a damaged one: {error}.") from error
    backend.no_truncation()  # settings of the training run that some files still carry
    backend.no_padding()
    return backend


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: not a JSON file, or a damaged one: {error}.") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: it holds a {type(value).__name__} where a JSON object was expected.")
    return value


def _token_text(value: Any) -> str | None:
    """A special token is written as a string, or as an object with its `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _add_configured_tokens(backend: Backend, folder: Path, config: Mapping[str, Any]) -> None:
    """Tokens that only `tokenizer_config.json` lists, or lists with other flags; a token is special if either file says so."""
    listed = config.get("added_tokens_decoder", {})
    known = backend.get_added_tokens_decoder()
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    missing: dict[int, AddedToken] = {}
    try:
        for key, entry in listed.items():
            token = AddedToken(entry["content"], **{flag: bool(entry[flag]) for flag in flags if flag in entry})
            before = known.get(int(key))
            token.special = token.special or (before is not None and before.special)
            if repr(before) != repr(token):
                missing[int(key)] = token
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is damaged: {error!r}.") from error
    add_tokens(backend, missing, str(folder / "tokenizer_config.json"))
    named = [text for name in SPECIAL_NAMES if (text := _token_text(config.get(name))) is not None]
    listed_texts = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in named if text not in listed_texts])


def _end_ids(folder: Path, eos: int | None) -> tuple[int, ...]:
    """Every id that ends a reply: generation_config.json first, it is the model's own list; then config.json; then eos_token."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _json_object(folder / name).get("eos_token_id")
        values = value if isinstance(value, list) else [value]
        if not all(item is None or isinstance(item, int) for item in values):
            raise ModelLoadError(f"{folder / name}: eos_token_id is {value!r}, but must be an id or a list of ids.")
        ids += [item for item in values if item is not None]
    return tuple(dict.fromkeys(ids + ([] if eos is None else [eos])))


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """All named templates; the newest place to keep them wins: .jinja files, then chat_template.json, then the config."""
    templates: dict[str, str] = {}
    for value in (config.get("chat_template"), _json_object(folder / "chat_template.json").get("chat_template")):
        if isinstance(value, str):
            templates["default"] = value
        elif isinstance(value, Mapping):
            templates.update({str(name): str(text) for name, text in value.items()})
        elif isinstance(value, list):
            if not all(isinstance(entry, Mapping) and {"name", "template"} <= entry.keys() for entry in value):
                raise ModelLoadError(f"{folder / 'tokenizer_config.json'}: chat_template is a list without names and templates.")
            templates.update({str(entry["name"]): str(entry["template"]) for entry in value})
    files = {"default": folder / "chat_template.jinja"}
    files.update({path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))})
    try:
        templates.update({name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()})
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{folder}: a chat template file can't be read: {error}.") from error
    return templates
