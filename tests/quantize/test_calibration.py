"""Calibration files of every kind that people have, and what is said of those that can't be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minfer.errors import RequestError
from minfer.quantize import read_calibration


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def read(file: Path, samples: int = 4, seqlen: int = 5) -> list[list[int]]:
    return read_calibration(file, encode, samples, seqlen)


def test_a_text_is_cut_evenly(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("".join(chr(65 + n) for n in range(26)))
    assert ["".join(map(chr, ids)) for ids in read(file, samples=3)] == ["ABCDE", "KLMNO", "UVWXY"]
    assert len(read(file, samples=100)) == 5


@pytest.mark.parametrize(
    "line",
    [
        '"hello world"',
        '{"text": "hello world"}',
        '{"meta": 1, "content": "hello world"}',
        '{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]}',
    ],
)
def test_lines_of_json_bring_their_text(line: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(line + "\n\n" + line + "\n")
    assert "".join(map(chr, read(file, samples=1, seqlen=5)[0])) == "hello"


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("a.txt", b"abc", "holds 3 tokens, fewer than one sample of 5"),
        ("a.txt", b"\xff\xfe\x00bad", "not UTF-8"),
        ("a.jsonl", b'{"text": "hello"}\n{"text": ', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"words": "hello"}', "line 1 of .* holds no text"),
        ("a.jsonl", json.dumps({"messages": [{"content": 3}]}).encode(), "holds no text"),
        ("a.jsonl", b"[1, 2]", "holds no text"),
        ("a.jsonl", b"[" * 100_000, "is not JSON"),
        ("a.jsonl", b"", "holds 0 tokens"),
    ],
)
def test_what_can_not_be_used_is_said(name: str, data: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError, match=why):
        read(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"nothing\.txt can't be read"):
        read(tmp_path / "nothing.txt")
