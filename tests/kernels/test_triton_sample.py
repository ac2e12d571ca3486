"""The Triton draw against float64 numpy that sorts everything, and the Triton sampler against the one that draws with torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernels.devices import DEVICE
from kernels.draws import LARGEST, Wish, allowed, logits_of, rows_of
from sampling_rows import make_row

from minfer.errors import ConfigError
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.sample import ROOM, sample
from minfer.sampling import Sampler

TRITON = TritonBackend(DEVICE, torch.float16)


def tokens(logits: torch.Tensor, wishes: list[Wish]) -> list[int]:
    asked, positions, _ = rows_of(wishes, DEVICE)
    return sample(logits.to(DEVICE), asked, positions).tolist()


@pytest.mark.parametrize(("width", "spread"), [(1, 3.0), (65, 3.0), (200, 0.0), (4200, 3.0)])
def test_draws(width: int, spread: float) -> None:
    filters = [(0, 1.0, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.05), (100, 0.9, 0.0), (width, 0.3, 0.0), (0, 0.9, 0.05), (0, 1.0, 0.02)]
    turns = itertools.cycle((0.0, 0.123, 0.5, 0.77, 0.999999))
    wishes = [(next(turns), t, float(k), p, m) for t in (0.6, 1.7) for k, p, m in filters]
    logits = logits_of(len(wishes), width, spread, width)
    for row, wish, token in zip(logits.double().numpy(), rows_of(wishes)[2], tokens(logits, wishes), strict=True):
        assert token in allowed(row, wish), wish


@pytest.mark.parametrize(("width", "wish"), [(ROOM + 500, (0.9, 1.0, ROOM + 100.0, 1.0, 0.0)), (700, (0.7, 3.0, 0.0, 0.95, 0.0))])
def test_where_candidates_are_too_many_or_too_few_the_row_is_searched(width: int, wish: Wish) -> None:
    """More than there is room for; a nucleus that a quarter of the blocks' maxima doesn't hold."""
    logits = logits_of(1, width, 1.0, 5)
    assert tokens(logits, [wish])[0] in allowed(logits[0].double().numpy(), rows_of([wish])[2][0])


def test_equal_logits_are_ranked_by_id() -> None:
    """Logits of few digits, as bfloat16 makes them: filters and draws end among equals."""
    logits = (logits_of(3, 2000, 2.0, 9) * 4).round() / 4
    wishes: list[Wish] = [(0.4, 0.9, 40.0, 1.0, 0.0), (0.8, 0.9, 40.0, 0.8, 0.0), (LARGEST, 0.9, 700.0, 1.0, 0.0)]
    for row, wish, token in zip(logits.double().numpy(), rows_of(wishes)[2], tokens(logits, wishes), strict=True):
        assert token in allowed(row, wish), wish


def test_a_draw_is_never_a_masked_token_and_never_past_the_end() -> None:
    logits = logits_of(5, 130, 2.0, 1)
    left = [3, 64, 129]
    logits[:, [i for i in range(130) if i not in left]] = -torch.inf
    wishes: list[Wish] = [(LARGEST, 1.0, 0.0, 1.0, 0.0), (LARGEST, 1.0, 50.0, 1.0, 0.0), (LARGEST, 1.0, 0.0, 0.999, 0.0)]
    wishes += [(0.0, 1e-35, 0.0, 1.0, 0.0), (LARGEST, 1e-35, 50.0, 1.0, 0.0)]
    assert set(tokens(logits, wishes)) <= set(left)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(3, 5000)
    logits[0, [700, 701, 4999]] = 5.0
    logits[1] = -0.0
    logits[1, 3] = 0.0
    assert tokens(logits, [(0.9, 0.0, 0.0, 1.0, 0.0)] * 3) == [700, 0, 0]


def test_rows_without_a_distribution_are_told_and_harm_no_other() -> None:
    logits = logits_of(6, 100, 1.0, 2)
    logits[0, 99] = torch.nan
    logits[1, 5] = torch.nan
    logits[2, 50] = torch.inf
    logits[3] = -torch.inf
    wishes: list[Wish] = [(0.5, 1.0, 0.0, 1.0, 0.0)] * 5 + [(0.5, 0.0, 0.0, 1.0, 0.0)]
    got = tokens(logits, wishes)
    assert got[:4] == [-1] * 4
    assert got[4] == tokens(logits[4:5], wishes[4:5])[0]
    assert got[5] == logits[5].argmax().item()


def test_frequencies_are_the_distribution() -> None:
    """Evenly spread numbers reach each token as often as its probability says: without filters, and the three that top-k leaves."""
    logits = logits_of(1, 70, 1.5, 3)
    for k, count in ((0, 60), (3, 8)):
        wishes: list[Wish] = [((i + 0.5) / count, 0.8, float(k), 1.0, 0.0) for i in range(count)]
        got = torch.bincount(torch.tensor(tokens(logits.expand(count, -1), wishes)), minlength=70) / count
        top = logits[0].double().topk(k or 70)
        expected = torch.zeros(70, dtype=torch.float64).scatter(0, top.indices, (top.values / 0.8).softmax(0))
        assert (got - expected).abs().max() < 2.01 / count


def test_the_same_seed_and_position_draw_the_same_token_as_torch() -> None:
    """Among them a top-k of four hundred digits, which means all and must not become a number of the device's."""
    wishes: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"top_k": 10**400, "temperature": 0.7}, {"top_k": 600}, {"top_k": 20, "top_p": 0.8}, {"top_p": 0.7},
        {"min_p": 0.05, "logprobs": 3}, {"temperature": 1.6, "top_k": 50, "repetition_penalty": 1.2}, {"logprobs": 0, "temperature": 0.0},
    ]  # fmt: skip
    rows = [make_row(seed, output=[5, 9][: seed % 3], **wish) for seed, wish in enumerate(wishes)]
    logits = logits_of(len(rows), 600, 2.5, 11).to(DEVICE)
    ours = Sampler(600, DEVICE, argmax=TRITON.argmax, draw=TRITON.sample, score=TRITON.logprobs).sample(logits.clone(), rows)
    theirs = Sampler(600, DEVICE).sample(logits.clone(), rows)
    assert ours.token_ids == theirs.token_ids
    assert ours.failed == theirs.failed == []
    for got, expected in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            assert (got.token_id, got.rank, got.top_token_ids) == (expected.token_id, expected.rank, expected.top_token_ids)
            assert [got.logprob, *got.top_logprobs] == pytest.approx([expected.logprob, *expected.top_logprobs], abs=1e-6)


def test_wrong_types_are_an_error() -> None:
    logits, wishes = torch.zeros(1, 8, device=DEVICE), torch.zeros(1, 6, dtype=torch.float64, device=DEVICE)
    positions = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ConfigError, match="float64 wishes"):
        sample(logits, wishes[:, :4], positions)
    for wrong in (positions.float(), positions.expand(2)):
        with pytest.raises(ConfigError, match="positions"):
            sample(logits, wishes, wrong)
    assert sample(logits[:0], wishes[:0], positions[:0]).shape == (0,)
