"""The policy against arithmetic: a line is recovered, and drafts stop where they no longer pay."""

from __future__ import annotations

import pytest

from minfer.speculative.policy import PRIOR, Acceptance, CostModel, draft_length


def model_of(fixed: float, each: float, sizes: list[int]) -> CostModel:
    costs = CostModel()
    for size in sizes:
        costs.observe(size, fixed + each * size)
    return costs


def test_nothing_is_known_before_two_sizes_were_seen() -> None:
    assert CostModel().share(1) == 0
    assert model_of(3e-3, 1e-4, [1] * 50).share(1) == 0


@pytest.mark.parametrize("sequences", [1, 4, 32])
def test_the_share_is_that_of_the_line(sequences: int) -> None:
    fixed, each = 3e-3, 2e-4
    share = model_of(fixed, each, [1, 9, 5, 1, 4]).share(sequences)
    assert share == pytest.approx(each * sequences / (fixed + each * sequences), rel=1e-6)


def test_the_slope_survives_a_long_time_without_drafts() -> None:
    costs = model_of(3e-3, 2e-4, [1, 9, 9, *[1] * 2000])
    assert costs.share(1) == pytest.approx(2e-4 / 3.2e-3, rel=1e-3)


def test_noise_can_turn_the_line_down_but_not_the_share() -> None:
    costs = CostModel()
    for size, seconds in ((1, 5e-3), (9, 1e-3), (1, 5e-3)):
        costs.observe(size, seconds)
    assert costs.share(1) == 0
    assert costs.share(1000) == 1


@pytest.mark.parametrize(
    ("rate", "share", "expected"),
    [
        (0.9, 0.0, 8),  # drafts cost nothing
        (0.5, 0.2, 2),  # 0.5 and 0.25 are above 0.23, 0.125 is not
        (0.5, 0.5, 0),
        (0.99, 1.0, 0),  # a full batch: a token costs what it costs
        (1.0, 0.5, 8),
        (0.05, 0.01, 1),
    ],
)
def test_a_draft_is_made_while_its_chance_is_above_its_cost(rate: float, share: float, expected: int) -> None:
    assert draft_length(rate, share, 8) == expected


def test_acceptance_follows_what_happens_and_recovers_when_nothing_does() -> None:
    acceptance = Acceptance()
    for _ in range(30):
        acceptance.verified(drafted=4, accepted=0)
    low = acceptance.rate
    assert low < 0.02
    for _ in range(10):
        acceptance.idle()
    assert low < acceptance.rate < PRIOR
    for _ in range(1000):
        acceptance.idle()
    assert acceptance.rate == pytest.approx(PRIOR, abs=1e-3)
    for _ in range(30):
        acceptance.verified(drafted=4, accepted=4)
    assert acceptance.rate > 0.98


def test_drafts_behind_a_wrong_one_are_not_held_against_the_request() -> None:
    one, many = Acceptance(), Acceptance()
    one.verified(drafted=1, accepted=0)
    many.verified(drafted=8, accepted=0)
    assert one == many
