"""Writes a tokenizer as the files of a Hugging Face folder, whatever it was read from; the reverse of folder.py."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minfer.tokenizer.folder import read_folder
from minfer.tokenizer.gguf_vocab import read_gguf_metadata


def write_tokenizer(source: Path | Mapping[str, Any], folder: Path) -> None:
    """`source` is a folder or a GGUF file's metadata. Writes tokenizer.json and tokenizer_config.json."""
    tokenizer = read_folder(source) if isinstance(source, Path) else read_gguf_metadata(source)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= tokenizer.special_texts
    templates = tokenizer.chat_templates
    if set(templates) == {"default"}:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
