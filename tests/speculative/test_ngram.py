"""The n-gram index against a search that looks at everything."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minfer.speculative.ngram import MAX_CANDIDATES, MAX_MATCH, NgramIndex


def brute_force(tokens: list[int], min_match: int, count: int) -> list[int]:
    """The longest earlier occurrence of the end, the newest among equals, copied token by token."""
    best, longest = -1, 0
    tried = 0
    for end in range(len(tokens) - 2, -1, -1):
        length = 0
        while length <= end and length < MAX_MATCH and tokens[end - length] == tokens[-1 - length]:
            length += 1
        if length >= min_match and tried < MAX_CANDIDATES:
            tried += 1
            if length > longest:
                best, longest = end, length
    if best < 0:
        return []
    copied = list(tokens)
    for offset in range(count):
        copied.append(copied[best + 1 + offset])
    return copied[len(tokens) :]


@given(tokens=st.lists(st.integers(0, 2), max_size=60), min_match=st.integers(1, 4), count=st.integers(1, 9), step=st.integers(1, 7))
def test_it_finds_what_a_full_search_finds_however_the_text_grew(tokens: list[int], min_match: int, count: int, step: int) -> None:
    seen: list[int] = []
    index = NgramIndex(seen, min_match)
    for start in range(0, len(tokens), step):
        seen += tokens[start : start + step]
        assert index.continuation(count) == brute_force(seen, min_match, count)


def test_a_quotation_is_continued() -> None:
    rng = random.Random(1)
    source = [rng.randrange(1000) for _ in range(500)]
    index = NgramIndex([*source, 7, 7, 7, *source[100:104]], 3)
    assert index.continuation(6) == source[104:110]


def test_a_period_is_continued_past_the_end_of_the_text() -> None:
    assert NgramIndex([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], 3).continuation(7) == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4, 1, 2]])
def test_without_a_match_there_is_no_guess(tokens: list[int]) -> None:
    assert NgramIndex(tokens, 3).continuation(5) == []


def test_no_tokens_are_guessed_when_none_are_wanted() -> None:
    assert NgramIndex([1, 2, 3] * 5, 3).continuation(0) == []
