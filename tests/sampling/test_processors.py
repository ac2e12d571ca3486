"""Bias, bad words and min-tokens against transformers' processors, on logits compared entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import make_row
from transformers import MinNewTokensLengthLogitsProcessor, NoBadWordsLogitsProcessor

from minfer.sampling.processors import BadWords, IdentityCache, LogitBias, LogitsProcessor, MinTokens

VOCAB = 40


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("processor", [LogitBias(), BadWords(), MinTokens()])
def test_rows_that_do_not_ask_stay_bit_equal(processor: LogitsProcessor) -> None:
    logits = noise(3)
    asking = make_row(logit_bias={3: 2.5}, bad_word_token_ids=((3,),), min_tokens=5)
    processor(logits, [make_row(), asking, make_row()])
    assert torch.equal(logits[[0, 2]], noise(3)[[0, 2]])
    assert not torch.equal(logits[1], noise(3)[1])


def test_logit_bias_is_added() -> None:
    logits = noise(2)
    bias = {0: 100.0, VOCAB - 1: -100.0, 7: 0.25}
    processor = LogitBias()
    for _ in range(2):  # the second time from the cache
        logits = noise(2)
        processor(logits, [make_row(logit_bias=bias), make_row(logit_bias={1: 1.0})])
    expected = noise(2)
    for token, value in bias.items():
        expected[0, token] += value
    expected[1, 1] += 1.0
    assert torch.equal(logits, expected)


def test_ids_past_the_vocabulary_touch_nothing() -> None:
    """Request validation refuses them earlier; here they must not reach a neighbour's row."""
    logits = noise(2)
    row = make_row(logit_bias={VOCAB: 5.0, 3: 1.0}, bad_word_token_ids=((VOCAB + 2,),), min_tokens=1, stop_token_ids=[VOCAB])
    for processor in (LogitBias(), BadWords(), MinTokens()):
        processor(logits, [row, make_row()])
    expected = noise(2)
    expected[0, 3] += 1.0
    expected[0, 2] = -torch.inf  # the end of sequence
    assert torch.equal(logits, expected)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple), min_size=1, max_size=5).map(tuple),
    st.lists(st.integers(0, 4), max_size=9),
)
def test_bad_words_are_those_of_transformers(words: tuple[tuple[int, ...], ...], output: list[int]) -> None:
    """transformers matches over its whole input, so it is given the output alone."""
    logits = noise(1)
    BadWords()(logits, [make_row(output=output, bad_word_token_ids=words)])
    theirs = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=[VOCAB - 1])
    assert torch.equal(logits, theirs(torch.tensor([output], dtype=torch.int64), noise(1)))


def test_bad_words_do_not_look_at_the_prompt() -> None:
    logits = noise(1)
    BadWords()(logits, [make_row(prompt=[1, 5], bad_word_token_ids=((5, 6),))])
    assert torch.equal(logits, noise(1))


@pytest.mark.parametrize("done", [0, 2, 3, 4])
def test_min_tokens_masks_every_end_until_reached(done: int) -> None:
    logits = noise(1)
    row = make_row(output=[9] * done, min_tokens=3, stop_token_ids=[11, 12])
    MinTokens()(logits, [row])
    theirs = MinNewTokensLengthLogitsProcessor(3, 3, [2, 11, 12])
    assert torch.equal(logits, theirs(torch.tensor([row.prompt_token_ids + row.output_token_ids]), noise(1)))


def test_identity_cache_is_bounded_and_never_takes_a_new_object_for_an_old_one() -> None:
    made: list[list[int]] = []
    cache: IdentityCache[list[int], int] = IdentityCache(lambda key: made.append(key) or key[0], capacity=4)
    for value in range(100):
        assert cache.get([value]) == value
    key = [5]
    before = len(made)
    assert cache.get(key) == cache.get(key) == 5
    assert len(made) == before + 1
    assert len(cache._entries) == 4
