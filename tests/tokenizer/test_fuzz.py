"""tokenizer.json and its neighbours with anything in any place: a sentence about the file, or a tokenizer that works."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minfer.errors import MinferError
from minfer.tokenizer import Tokenizer

JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    2**31,
    2**64,
    1.5,
    "",
    "a",
    "\x00",
    "é",
    "<|im_end|>",
    [],
    {},
    [0],
    ["a"],
    [["a", "b"]],
    {"a": 0},
    {"type": "x"},
]
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
FUZZ: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(tiny_tokenizer, target, dirs_exist_ok=True)
    return target


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values in a JSON document; of long lists and objects the first few only, for the others are alike."""
    found = [path]
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    for name, inner in items[:12]:
        found += places(inner, (*path, name))
    return found


def replaced(document: Any, path: tuple[Any, ...], junk: Any) -> Any:
    if not path:
        return junk
    document = copy.deepcopy(document)
    inner = document
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = junk
    return document


def _fuzz(folder: Path, original: Path, data: st.DataObject) -> None:
    names = [name for name in FILES if (original / name).is_file()]
    for name in names:
        shutil.copy(original / name, folder / name)
    file = folder / data.draw(st.sampled_from(names))
    if data.draw(st.booleans()):
        document = json.loads(file.read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            document = replaced(document, data.draw(st.sampled_from(places(document))), data.draw(st.sampled_from(JUNK)))
        file.write_text(json.dumps(document))
    else:
        content = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=8))
        file.write_bytes(content)
    try:
        tokenizer = Tokenizer.from_folder(folder)
        ids = tokenizer.encode("The quick brown fox, 123. <|im_end|>")
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        tokenizer.decode(ids)
        for token in ids:
            tokenizer.token_bytes(token)
        said = ""
    except MinferError as error:
        said = str(error)
    assert "\n" not in said, "one sentence"


@settings(max_examples=60, derandomize=True, **FUZZ)
@given(data=st.data())
def test_fuzzed_tokenizer_files(folder: Path, tiny_tokenizer: Path, data: st.DataObject) -> None:
    _fuzz(folder, tiny_tokenizer, data)


@pytest.mark.slow
@settings(max_examples=3000, **FUZZ)
@given(data=st.data())
def test_fuzzed_tokenizer_files_at_length(folder: Path, tiny_tokenizer: Path, data: st.DataObject) -> None:
    _fuzz(folder, tiny_tokenizer, data)
