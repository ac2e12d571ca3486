"""Log-probabilities against float64 log_softmax, and the exact agreement of chosen and listed values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import make_row

from minfer.sampling import RowLogprobs, Sampler, prompt_logprobs


def noise(rows: int, vocab: int, seed: int = 0, step: float | None = None) -> torch.Tensor:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4
    return (logits / step).round() * step if step else logits


def check(found: RowLogprobs, logits: torch.Tensor, token: int, k: int) -> None:
    truth = logits.double().log_softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    assert found.token_id == token
    assert found.logprob == pytest.approx(float(truth[token]), abs=1e-6, rel=1e-6)
    assert found.rank == order.index(token) + 1
    assert found.top_token_ids == order[:k]
    assert found.top_logprobs == pytest.approx(truth[order[:k]].tolist(), abs=1e-6, rel=1e-6)
    assert found.logprob <= 0
    if token in found.top_token_ids:
        assert found.top_logprobs[found.top_token_ids.index(token)] == found.logprob


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 64, 100, 700]), st.sampled_from([None, 0.25, 4.0]), st.integers(0, 20))
def test_prompt_logprobs(seed: int, vocab: int, step: float | None, k: int) -> None:
    logits = noise(6, vocab, seed, step)
    targets = [(seed + 7 * i) % vocab for i in range(6)]
    for found, row, target in zip(prompt_logprobs(logits.clone(), targets, k), logits, targets, strict=True):
        check(found, row, target, k)


def test_prompt_logprobs_row_by_row_are_bit_equal() -> None:
    logits = noise(9, 5000)
    targets = list(range(9))
    alone = [prompt_logprobs(logits[i : i + 1].clone(), targets[i : i + 1], 5)[0] for i in range(9)]
    assert prompt_logprobs(logits.clone(), targets, 5) == alone
    assert prompt_logprobs(logits[:0], [], 5) == []


def test_prompt_logprobs_takes_inference_tensors() -> None:
    with torch.inference_mode():
        logits = noise(1, 10)
    assert prompt_logprobs(logits, [3], 1)[0].token_id == 3


def test_sampled_logprobs_are_raw_whatever_the_parameters() -> None:
    logits = noise(5, 400, step=0.5)
    rows = [
        make_row(temperature=0, logprobs=3),
        make_row(1),
        make_row(2, temperature=0.3, top_k=5, logprobs=0, logit_bias={9: 50.0}),
        make_row(3, top_p=0.5, logprobs=20, repetition_penalty=1.7, prompt=list(range(100))),
        make_row(4, logprobs=1, bad_word_token_ids=((int(logits[4].argmax()),),)),
    ]
    output = Sampler(400).sample(logits.clone(), rows)
    assert output.logprobs[1] is None
    for index, k in ((0, 3), (2, 0), (3, 20), (4, 1)):
        found = output.logprobs[index]
        assert found is not None
        check(found, logits[index], output.token_ids[index], k)
    assert output.token_ids[2] == 9
    assert output.logprobs[0] is not None
    assert output.logprobs[0].rank == 1


def test_asking_for_logprobs_changes_no_token() -> None:
    logits = noise(20, 300)
    with_ = Sampler(300).sample(logits.clone(), [make_row(i, logprobs=5) for i in range(20)])
    without = Sampler(300).sample(logits.clone(), [make_row(i) for i in range(20)])
    assert with_.token_ids == without.token_ids


def test_masked_logits_and_large_logits() -> None:
    logits = torch.full((1, 100), -torch.inf)
    logits[0, [4, 90]] = torch.tensor([1e4, 1e4])
    found = prompt_logprobs(logits.clone(), [90], 5)[0]
    assert found.logprob == pytest.approx(-0.693147, abs=1e-6)
    assert found.rank == 2
    assert found.top_token_ids == [4, 90, 0, 1, 2]
    assert found.top_logprobs[2:] == [-float("inf")] * 3


def test_certainty_is_zero_and_not_more() -> None:
    logits = torch.full((1, 49152), -60.0)
    logits[0, 7] = 60.0
    assert prompt_logprobs(logits, [7], 1)[0].logprob == 0.0
