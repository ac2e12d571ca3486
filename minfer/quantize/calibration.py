"""Calibration data from a file: text, or JSON lines with a text in each, cut into samples of one length.

Texts are tokenised one by one and joined, so a sample may hold the end of one and the beginning of the next, as in training.
Where there is more than is asked for, the samples are spread evenly over the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from minfer.errors import RequestError

TEXT_KEYS = ("text", "content", "prompt", "completion")


def read_calibration(file: Path, encode: Callable[[str], list[int]], samples: int, seqlen: int) -> list[list[int]]:
    """`samples` lists of `seqlen` ids, or fewer where the file holds fewer; RequestError if not even one."""
    ids: list[int] = []
    for text in _texts(file):
        ids += encode(text)
    count = min(samples, len(ids) // seqlen)
    if count == 0:
        raise RequestError(f"{file} holds {len(ids)} tokens, fewer than one sample of {seqlen}; give a longer text or a smaller --seqlen")
    stride = (len(ids) - seqlen) // max(count - 1, 1)
    return [ids[n * stride : n * stride + seqlen] for n in range(count)]


def _texts(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{file} can't be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from error
    if file.suffix not in (".jsonl", ".json", ".ndjson"):
        return [text]
    return [_text_of(line, f"line {n} of {file}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]


def _text_of(line: str, where: str) -> str:
    """A line is a string, an object with a text, or one with chat messages."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from error
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        for key in TEXT_KEYS:
            if isinstance(value.get(key), str):
                return str(value[key])
        messages = value.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
            return "\n".join(m["content"] for m in messages)
    raise RequestError(f"{where} holds no text; expected a string or an object with one of {', '.join(TEXT_KEYS)} or messages")
