"""Which repeats are given up when time is short: arithmetic on a clock that the test moves."""

from __future__ import annotations

from compare.budget import Budget


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_limits_everything_fits() -> None:
    budget = Budget()
    budget.begin(3)
    assert budget.round_fits(1e9)
    assert budget.case_fits([1e9, 1e9])


def test_the_first_repeat_always_runs_and_a_further_one_while_the_sum_stays_below_the_limit() -> None:
    budget = Budget(case_s=90)
    assert budget.case_fits([])
    assert not budget.case_fits([150.0])
    assert budget.case_fits([30.0, 30.0])
    assert not budget.case_fits([31.0, 30.5])


def test_a_workload_may_use_an_even_share_and_leaves_the_rest_to_those_after_it() -> None:
    clock = Clock()
    budget = Budget(total_s=60, clock=clock)
    budget.begin(3)
    assert budget.round_fits(20)
    assert not budget.round_fits(20.1)
    clock.now += 10  # it used half of its 20 seconds
    budget.begin(2)
    assert budget.round_fits(25)
    assert not budget.round_fits(25.1)
    clock.now += 60  # over: nothing but first repeats from here on
    budget.begin(1)
    assert not budget.round_fits(0.1)
