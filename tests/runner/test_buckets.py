"""Buckets hold the steps they are found for, are few, and bound the grid of attention whatever a step's lengths are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minfer.config import EngineConfig
from minfer.runner.buckets import Bucket, Buckets, ladder


@pytest.mark.parametrize(("largest", "expected"), [(1, [1]), (6, [1, 2, 4, 6]), (20, [1, 2, 4, 8, 16, 20])])
def test_sizes(largest: int, expected: list[int]) -> None:
    assert ladder(largest) == expected


def test_which_bucket_a_step_gets() -> None:
    buckets = Buckets(20, longest=5)
    assert buckets.find([1] * 3, 3) == Bucket(4, 4)
    assert buckets.find([5], 5) == Bucket(8, 1, 5)
    assert buckets.find([2], 2) == Bucket(2, 1, 2)
    assert buckets.find([1, 3, 1], 5) == Bucket(8, 4, 5)
    assert buckets.find([5] * 20, 100) == Bucket(100, 20, 5)
    assert buckets.find([6], 6) is None, "a prompt"
    assert Buckets(20).find([1, 2], 3) is None, "an engine without drafts"
    assert Buckets(20, 5, tokens=50).find([5] * 11, 55) is None, "more than a step may have"
    assert Buckets(4, 5, rows=20).find([2, 1, 1, 1, 1], 6) == Bucket(8, 8, 5), "drafts that branch are requests"


def test_what_an_engine_asks_for() -> None:
    config = EngineConfig(model="m", max_num_seqs=16, max_num_batched_tokens=64, num_draft_tokens=4)
    assert Buckets.of(config).longest == 1
    drafting = EngineConfig(model="m", max_num_seqs=16, max_num_batched_tokens=64, num_draft_tokens=4, speculative="ngram")
    assert (Buckets.of(drafting).longest, Buckets.of(drafting).most_tokens, Buckets.of(drafting).most_requests) == (5, 64, 16)
    branching = EngineConfig(
        model="m", max_num_seqs=16, max_num_batched_tokens=64, num_draft_tokens=4, speculative="draft", draft_model="h", draft_top_k=2
    )
    assert Buckets.of(branching).most_requests == 64


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=64),
    most=st.sampled_from([64, 100, 256]),
    tile=st.sampled_from([2, 4, 16, 64]),
)
def test_a_bucket_holds_its_step_and_the_tiles_of_attention(lengths: list[int], most: int, tile: int) -> None:
    bucket = Buckets(most, longest=9).find(lengths, sum(lengths))
    assert bucket is not None
    assert bucket.tokens >= sum(lengths) and bucket.requests >= len(lengths) and bucket.longest >= max(lengths)
    assert bucket.tokens <= max(4, 2 * sum(lengths)) and bucket.requests <= 2 * len(lengths)
    # The grid of `kernels/triton/attention.py`: tiles of one request each, request r's from query_start[r] // tile + r on.
    start, end = 0, 0
    for number, length in enumerate(lengths):
        first = start // tile + number
        assert first >= end
        start, end = start + length, first + -(-length // tile)
    assert end <= bucket.tokens // tile + bucket.requests
