"""The wish itself: exactly one form, of the right type."""

from __future__ import annotations

from typing import Any

import pytest

from minfer.errors import RequestError
from minfer.sampling_params import SamplingParams
from minfer.structured_outputs import StructuredOutputsParams


@pytest.mark.parametrize(
    ("wish", "kind", "source"),
    [
        ({"json": {"type": "string"}}, "json", '{"type": "string"}'),
        ({"json": '{"type":"string"}'}, "json", '{"type":"string"}'),
        ({"json_object": True}, "json", '{"type":"object"}'),
        ({"regex": "a+", "json_object": False}, "regex", "a+"),
        ({"choice": ["a", "b"]}, "choice", '["a", "b"]'),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
    ],
)
def test_forms(wish: dict[str, Any], kind: str, source: str) -> None:
    form = StructuredOutputsParams.from_mapping({**wish, "disable_fallback": None})
    assert (form.kind, form.source) == (kind, source)


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"json_object": False},
        {"json": {}, "regex": "a"},
        {"json": 5},
        {"json": ""},
        {"json": {"a": {1, 2}}},
        {"regex": 5},
        {"choice": []},
        {"choice": "ab"},
        {"choice": [""]},
        {"choice": [1]},
        {"grammar": ["a"]},
        {"json_object": "yes"},
        {"structural_tag": "x"},
    ],
)
def test_refused(wish: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        StructuredOutputsParams.from_mapping(wish)
    assert refused.value.param == "structured_outputs"


def test_sampling_params_take_a_mapping_too() -> None:
    params = SamplingParams(structured_outputs={"choice": ["a"]})
    assert params.structured_outputs == StructuredOutputsParams(choice=["a"])


@pytest.mark.parametrize("other", [{"bad_words": ["x"]}, {"min_tokens": 3}])
def test_bans_beside_it_are_refused(other: dict[str, Any]) -> None:
    """Both could forbid the only token that the form allows, and nothing would be left to pick."""
    with pytest.raises(RequestError) as refused:
        SamplingParams(structured_outputs={"choice": ["a"]}, **other)
    assert refused.value.param in other
