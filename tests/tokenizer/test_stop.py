"""Stop strings: what is emitted is the text cut at its leftmost stop, however it was cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minfer.errors import RequestError
from minfer.tokenizer import StopMatcher

# Two letters only, so that overlaps, prefixes and near misses are the rule.
WORD = st.text(alphabet="ab", min_size=1, max_size=5)


def leftmost(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The definition, by trying every place: the first place where a stop begins, and the shortest that does."""
    for start in range(len(text)):
        begun = [stop for stop in stops if text.startswith(stop, start)]
        if begun:
            return start, min(begun, key=len)
    return None


@given(pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=12), stops=st.lists(WORD, max_size=4), include=st.booleans())
@settings(max_examples=800, deadline=None)
def test_emitted_text_is_the_text_cut_at_the_leftmost_stop(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    emitted = "".join([matcher.feed(piece) for piece in pieces] + [matcher.finish()])
    text, found = "".join(pieces), leftmost("".join(pieces), stops)
    if found is None:
        assert (emitted, matcher.matched) == (text, None)
    else:
        start, stop = found
        assert (emitted, matcher.matched) == (text[: start + (len(stop) if include else 0)], stop)


@given(pieces=st.lists(st.text(alphabet="ab", max_size=4), max_size=12), stops=st.lists(WORD, min_size=1, max_size=4))
@settings(max_examples=500, deadline=None)
def test_nothing_is_withheld_that_can_not_become_a_stop(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    text = emitted = ""
    for piece in pieces:
        text, emitted = text + piece, emitted + matcher.feed(piece)
        if matcher.matched is None:
            held = text[len(emitted) :]
            assert not held or any(len(stop) > len(held) and stop.startswith(held) for stop in stops)


def test_a_stop_over_many_pieces() -> None:
    matcher = StopMatcher(["</answer>"])
    assert [matcher.feed(piece) for piece in ["42 <", "/ans", "w", "er> and more"]] == ["42 ", "", "", ""]
    assert matcher.matched == "</answer>"
    assert matcher.feed("later") == "" == matcher.finish()


def test_a_near_miss_is_emitted_as_soon_as_it_fails() -> None:
    matcher = StopMatcher(["###"])
    assert [matcher.feed(piece) for piece in ["a#", "#", "b"]] == ["a", "", "##b"]
    assert matcher.finish() == ""


def test_of_two_stops_that_begin_together_the_shorter_wins() -> None:
    matcher = StopMatcher(["abcd", "ab"])
    assert matcher.feed("xabcd") == "x"
    assert matcher.matched == "ab"


def test_the_one_that_began_earlier_is_waited_for() -> None:
    waiting = StopMatcher(["cd", "abcdef"])
    assert waiting.feed("xabcd") == "x"
    assert waiting.matched is None
    assert waiting.feed("e!") == "ab"
    assert waiting.matched == "cd"
    ending = StopMatcher(["cd", "abcdef"])
    assert ending.feed("xabcd") + ending.finish() == "xab"
    assert ending.matched == "cd"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        StopMatcher(["a", ""])
