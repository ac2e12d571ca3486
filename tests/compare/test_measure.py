"""Arithmetic on synthetic timestamps whose answers are known by hand, and numpy and scipy-free formulas as oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import measure
from compare.measure import PairedRatio, Slo, Spread
from compare.protocol import Trace


def trace(arrival: float, *times: float, prompt: int = 10) -> Trace:
    return Trace(arrival, prompt, [0] * len(times), list(times))


def test_one_request() -> None:
    numbers = measure.summarise([trace(1.0, 1.5, 1.7, 1.9)])
    assert numbers["ttft_p50_s"] == pytest.approx(0.5)
    assert numbers["tpot_p50_s"] == pytest.approx(0.2)
    assert numbers["e2e_p50_s"] == pytest.approx(0.9)
    assert numbers["duration_s"] == pytest.approx(0.9)
    assert numbers["prefill_tokens_per_s"] == pytest.approx(20.0)
    assert numbers["decode_tokens_per_s"] == pytest.approx(5.0)
    assert numbers["output_tokens_per_s"] == pytest.approx(3 / 0.9)


def test_a_single_token_has_no_decode_rate() -> None:
    numbers = measure.summarise([trace(0.0, 0.25)])
    assert "decode_tokens_per_s" not in numbers
    assert "tpot_p50_s" not in numbers
    assert numbers["prefill_tokens_per_s"] == pytest.approx(40.0)


def test_decode_rate_counts_only_while_all_decode() -> None:
    # The first ends at 4, the second begins at 2: in (2, 4] come 3 and 4 of the first, 3 and 4 of the second.
    assert measure.decode_rate([trace(0, 1, 2, 3, 4), trace(0, 2, 3, 4, 5)]) == pytest.approx(2.0)


def test_requests_one_after_another_have_no_common_decode_rate() -> None:
    assert measure.decode_rate([trace(0, 1, 2), trace(0, 3, 4)]) is None


def test_percentiles_need_their_sample() -> None:
    few, many = measure.spread("x", [1.0] * 9), measure.spread("x", [1.0] * 100)
    assert "x_p90_s" not in few
    assert "x_p99_s" not in measure.spread("x", [1.0] * 99)
    assert "x_p99_s" in many


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], q: float) -> None:
    assert measure.percentile(values, q) == pytest.approx(float(np.percentile(values, q)), abs=1e-6)


def test_goodput_counts_those_within_both_limits() -> None:
    slo = Slo(ttft=1.0, tpot=0.1)
    good, late, slow = trace(0, 0.5, 0.55, 0.6), trace(0, 1.5, 1.55), trace(0, 0.5, 2.0)
    numbers = measure.summarise([good, late, slow], slo)
    assert numbers["good_share"] == pytest.approx(1 / 3)
    assert numbers["goodput_per_s"] == pytest.approx(1 / 2.0)


def test_the_interval_holds_the_median_and_is_the_same_every_time() -> None:
    values = [10.0, 11.0, 12.0, 13.0, 30.0]
    spread = Spread.of(values)
    assert spread.low <= spread.median == 12.0 <= spread.high
    assert Spread.of(values) == spread
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0, 1, 5.0, 0.0)


def test_pairs_cancel_the_machines_drift() -> None:
    drift = [1.0, 0.5, 2.0, 0.7, 1.3]
    a = {i: 110.0 * d for i, d in enumerate(drift)}
    b = {i: 100.0 * d for i, d in enumerate(drift)}
    ratio = measure.paired_ratio(a, b)
    assert ratio is not None
    assert ratio.spread.low == pytest.approx(1.1)
    assert ratio.verdict == "faster"
    lower = measure.paired_ratio(a, b, higher_is_better=False)
    assert lower is not None
    assert lower.verdict == "slower"


def test_no_ranking_where_the_interval_holds_one_or_pairs_are_few() -> None:
    noisy = measure.paired_ratio({0: 1.2, 1: 0.8, 2: 1.1, 3: 0.9}, dict.fromkeys(range(4), 1.0))
    assert noisy is not None
    assert noisy.verdict == "no clear difference"
    assert PairedRatio(Spread.of([2.0, 2.0])).verdict == "no clear difference"
    assert measure.paired_ratio({0: 1.0}, {1: 1.0}) is None


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    assert measure.perplexity([[math.log(1 / 50)] * 7, [math.log(1 / 50)] * 2]) == pytest.approx(50.0)


def test_agreement_stops_at_the_first_difference() -> None:
    numbers = measure.prefix_agreement([[1, 2, 9, 4], [1, 2, 3, 4], [9, 2, 3, 4]], [[1, 2, 3, 4]] * 3)
    assert numbers["agreement"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert numbers["exact_share"] == pytest.approx(1 / 3)
    assert numbers["first_token_share"] == pytest.approx(2 / 3)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=4, max_size=12), st.lists(st.floats(0.01, 1), min_size=12, max_size=12))
def test_coarse_kl_is_a_lower_bound_of_the_whole(a: list[float], b: list[float]) -> None:
    p, q = np.array(a) / sum(a), np.array(b[: len(a)]) / sum(b[: len(a)])
    whole = float((p * np.log(p / q)).sum())
    top = sorted(range(len(p)), key=lambda i: -p[i])[:3]
    coarse = measure.coarse_kl({i: math.log(p[i]) for i in top}, {i: math.log(q[i]) for i in range(len(q))})
    assert -1e-9 <= coarse <= whole + 1e-6
    assert measure.coarse_kl({i: math.log(v) for i, v in enumerate(p)}, {i: math.log(v) for i, v in enumerate(p)}) == pytest.approx(
        0, abs=1e-6
    )
