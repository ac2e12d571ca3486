"""The endings that the coverage table counts, each once."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from compare.structured import check, cost, cost_table, summary, table
from compare.structured_page import PAGE, update

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
    runs = [{"split": "x", "ending": "valid", "tokens": 5}, {"split": "y", "ending": "refused"}]
    groups = summary(runs)
    assert groups["all"] == {"schemas": 2, "valid": 1, "cut": 0, "refused": 1, "invalid": 0}
    assert "| y | 1 | 0 | 0 | 1 | 0 |" in table(groups)


def test_the_cost_of_a_form_is_measured_beside_none(smollm2_gguf: Path) -> None:
    """Both arms say something, masks are counted only where there is a form, and forced tokens save steps."""
    schema = {"type": "object", "properties": {"a_very_long_name": {"const": "one fixed value"}}, "required": ["a_very_long_name"]}
    args = Namespace(model=str(smollm2_gguf), repeats=1, batch=2, max_tokens=40, limit=0)
    result = cost(args, [{"schema": schema}, {"schema": {"type": "foo"}}, {"schema": schema}])
    assert result["schemas"] == 2, "the one that is refused has no cost"
    for size in (1, 2):
        plain, single, forced = (result["medians"][f"{arm}, batch {size}"] for arm in ("plain", "one token a step", "forced together"))
        assert plain["mask_us_per_token"] == 0 and plain["tokens"] == 80
        assert single["masks_per_token"] == 1 and single["forced_share"] == 0
        assert single["tokens"] == forced["tokens"]
        assert forced["steps_per_token"] < single["steps_per_token"] and forced["forced_share"] > 0.3
        assert result["ratios"][f"forced together, batch {size}"][0] > 0
    assert result["compile_ms"]["schemas"] == 3
    assert "3 schemas were compiled" in cost_table(result)


def test_the_page_shows_what_was_measured() -> None:
    folder = max((PAGE.parents[1] / "results").glob("structured-*"))
    assert PAGE.read_text() == update(folder)
