"""The same ids for every engine, every time; sizes as the workloads state them."""

from __future__ import annotations

from pathlib import Path

import pytest

from compare import workloads
from compare.errors import CompareError
from compare.workloads import WORKLOADS, Source


def source(**changes: object) -> Source:
    values = {"vocab_size": 49152, "max_context": 8192, "encode": lambda text: list(text.encode()), **changes}
    return Source(**values)  # type: ignore[arg-type]


def test_ids_do_not_depend_on_which_other_workloads_run() -> None:
    alone = workloads.build(["throughput"], source())
    among = [c for c in workloads.build(list(WORKLOADS), source()) if c.workload == "throughput"]
    assert alone == among


def test_sizes_are_those_of_the_issue() -> None:
    cases = {c.key: c for c in workloads.build(list(WORKLOADS), source())}
    (latency,) = cases["latency/batch 1"].requests
    assert (len(latency.token_ids), latency.max_tokens) == (512, 128)
    offline = cases["throughput/offline"].requests
    assert len(offline) == 64
    assert all(64 <= len(r.token_ids) <= 512 and r.max_tokens == 128 for r in offline)
    assert [len(cases[f"decode-sweep/batch {b}"].requests) for b in (1, 2, 4, 8, 16, 32, 64)] == [1, 2, 4, 8, 16, 32, 64]
    assert "prefill/4096 in" in cases
    assert cases["essay/512 out"].repeats == 10
    shared = cases["shared-prefix/questions"].requests
    assert all(r.token_ids[:1000] == shared[0].token_ids[:1000] for r in shared)
    assert len({tuple(r.token_ids) for r in shared}) == len(shared)


def test_prefix_caching_is_on_only_where_the_workload_is_about_it() -> None:
    cases = workloads.build(list(WORKLOADS), source())
    assert {c.workload for c in cases if c.prefix_caching} == {"shared-prefix"}


def test_poisson_arrivals_have_the_rate_they_are_named_for() -> None:
    for case in workloads.build(["serving"], source()):
        rate = float(case.name.split()[0])
        arrivals = [r.arrival for r in case.requests]
        assert arrivals[0] == 0
        assert arrivals == sorted(arrivals)
        assert len(arrivals) / arrivals[-1] == pytest.approx(rate, rel=0.5)


def test_ids_are_valid_also_in_a_small_vocabulary() -> None:
    for case in workloads.build(["latency", "throughput", "serving"], source(vocab_size=300, max_context=2048)):
        assert all(0 <= t < 300 for r in case.requests for t in r.token_ids)


def test_cases_longer_than_the_model_are_left_out() -> None:
    names = [c.name for c in workloads.build(["prefill"], source(max_context=1024))]
    assert names == ["128 in", "512 in"]


def test_one_case_of_a_workload_can_be_asked_for() -> None:
    keys = [c.key for c in workloads.build(["prefill/512", "prefill/128 in", "decode-sweep/8"], source())]
    assert keys == ["prefill/512 in", "prefill/128 in", "decode-sweep/batch 8"]
    assert workloads.build(["prefill/512"], source())[0] in workloads.build(["prefill"], source())
    with pytest.raises(CompareError, match="no case '5'; it has 128 in"):
        workloads.build(["prefill/5"], source())


def test_quality_refuses_random_weights_and_unknown_names_are_listed() -> None:
    with pytest.raises(CompareError, match="random weights"):
        workloads.build(["quality"], source(real=False))
    with pytest.raises(CompareError, match="known are latency"):
        workloads.build(["speed"], source())


def test_quality_text_is_a_hundred_different_prompts_and_whole_windows(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("x" * 3000)
    text = workloads.quality_text(source(), file)
    assert len({tuple(p) for p in text.prompts}) == 100
    assert [len(w) for w in text.windows] == [1024, 1024]
    file.write_text("short")
    with pytest.raises(CompareError, match="fewer than 1,024"):
        workloads.quality_text(source(), file)
