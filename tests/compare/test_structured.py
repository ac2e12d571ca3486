"""The endings that the coverage table counts, each once."""

from __future__ import annotations

from typing import Any

import pytest

from compare.structured import check, summary, table

SCHEMA: dict[str, Any] = {"type": "object", "required": ["a"]}


@pytest.mark.parametrize(
    ("text", "finish_reason", "ending"),
    [
        ('{"a": 1}', "stop", "valid"),
        ('{"a', "length", "cut"),
        ("{}", "stop", "invalid"),
        ("{", "stop", "invalid"),
        ("", "error", "invalid"),
    ],
)
def test_endings(text: str, finish_reason: str, ending: str) -> None:
    assert check(text, SCHEMA, finish_reason)[0] == ending


def test_summary() -> None:
    runs = [
        {"split": "x", "ending": "valid", "compile_ms": 1.0, "tokens": 5, "mask_us_per_token": 50.0},
        {"split": "y", "ending": "refused", "compile_ms": 3.0},
    ]
    groups = summary(runs)
    assert (groups["all"]["schemas"], groups["all"]["valid"], groups["all"]["refused"], groups["all"]["compile_ms_median"]) == (
        2,
        1,
        1,
        2.0,
    )
    assert "| y | 1 | 0 | 0 | 1 | 0 | 3.0 | 3.0 | – | – |" in table(groups)
