"""Every Triton kernel compiled for GPUs that aren't here: nothing spills, everything fits, and nothing drifts from the budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import triton

from minfer.errors import ConfigError
from minfer.kernels.triton.aot import BUDGETS, TARGETS, compile_all, drift, faults, joined
from minfer.kernels.triton.aot_page import render

BUDGET = json.loads(BUDGETS.read_text())


@pytest.fixture(scope="module")
def compiling() -> Iterator[dict[str, Future[dict[str, dict[str, Any]]]]]:
    """By target. Each is a process of one thread, so two at a time take half as long."""
    pool = ThreadPoolExecutor(2)
    yield {target: pool.submit(compile_all, [target]) for target in TARGETS}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_as_budgeted(target: str, compiling: dict[str, Future[dict[str, dict[str, Any]]]]) -> None:
    reports = compiling[target].result()
    assert not faults(reports)
    assert not drift(reports, BUDGET), "if this is meant: python -m minfer.kernels.triton.aot --update"
    if BUDGET["triton"] == triton.__version__:
        assert set(reports) == {label for label, by in BUDGET["kernels"].items() if target in by}, (
            "the budget has other kernels than the cases"
        )


def test_what_the_budgets_promise() -> None:
    """Products use matrix instructions, weights come 16 bytes at a time, and 4-bit codes are unpacked without permutations."""
    for label, by_target in BUDGET["kernels"].items():
        for target, report in by_target.items():
            assert report["spills"] == 0
            second = "merge" in label or "rotate" in label
            plain = any(word in label for word in ("bf16", "reduce", "quantize_rows", "512 rows"))  # no products, or sums of them
            plain = plain or (target.startswith("hip") and label.endswith("1 row"))
            dot = (label.startswith("attention") and not second) or "gemm" in label or (label.startswith("linear") and not plain)
            dot = dot or label.startswith("lora") or "grouped" in label
            assert bool(report["matrix"]) == dot, (label, target)
            if target.startswith("cuda") and label != "attention, 64 sequences, smollm2, merge" and not label.endswith("route"):
                assert "16" in report["loads"], (label, target)
            looped = label.startswith("linear, int4") or (label.startswith("moe, int4") and label.endswith("grouped_codes"))
            if target.startswith("cuda") and looped:  # the second product's loop, over 768 inputs, is unrolled
                assert report["permutes"] * 20 <= report["loop"], (label, target)  # a zero point for both halves, once a group
                assert report["loop"] > 100 or "reduce" in label or "512 rows" in label, "its loop was not found"


def test_the_page_is_made_from_the_budget() -> None:
    assert (Path(__file__).parents[2] / "docs" / "kernels-gpu.md").read_text() == render(BUDGET)


def test_drift_and_faults_are_seen() -> None:
    report: dict[str, Any] = {"registers": 40, "spills": 0, "shared": 1024}
    budget = {"triton": triton.__version__, "kernels": {"one": {"cuda:90": report}}}
    assert drift({"one": {"cuda:90": dict(report)}}, budget) == []
    assert drift({"one": {"cuda:90": {**report, "registers": 48}}}, budget) == ["one for cuda:90: registers 40 -> 48"]
    assert drift({"two": {"cuda:90": report}}, budget) == ["two for cuda:90 has no budget"]
    assert drift({"one": {"cuda:90": {**report, "registers": 48}}}, {**budget, "triton": "0"}) == []
    assert "16 bytes of registers spilled" in faults({"one": {"cuda:90": {**report, "spills": 16}}})[0]
    assert "of 65536" in faults({"one": {"hip:gfx942": {**report, "shared": 65537}}})[0]


def test_an_update_of_some_cases_replaces_theirs_and_leaves_the_others() -> None:
    both = {"cuda:80": {"registers": 1}, "cuda:90": {"registers": 1}}
    kept = {"sample, merge": both, "sample, merge 2": both, "sample, of merged rows": both, "gone": both, "gone, merge": both}
    budget = {"triton": triton.__version__, "kernels": {"merge, draw": both, "merge, old": {"cuda:90": {}}, "merge, many": both, **kept}}
    cases = ["sample", "sample, of merged rows", "merge", "merge, many"]
    reports: dict[str, Any] = {"merge, draw": {"cuda:90": {"registers": 2}}, "sample, of merged rows": {"cuda:90": {"registers": 3}}}
    updated = {"merge, draw": {**both, "cuda:90": {"registers": 2}}, "sample, of merged rows": {**both, "cuda:90": {"registers": 3}}}
    half = {"cuda:80": {"registers": 1}}
    assert joined(budget, reports, cases, "merge") == {**kept, "merge, many": half, **updated}
    assert joined(budget, reports, cases, "merge, m") == {**budget["kernels"], "merge, many": half, **updated}
    everything = joined(budget, reports, cases, "")
    assert everything == {**dict.fromkeys(everything, half), **updated}
    assert set(everything) == set(budget["kernels"]) - {"merge, old"}
    with pytest.raises(ConfigError, match="update it without --only"):
        joined({**budget, "triton": "0"}, reports, cases, "merge")


def test_a_compiler_that_dies_names_its_kernel() -> None:
    code = (
        "from unittest import mock\nfrom minfer.kernels.triton import aot\n"
        "with mock.patch.object(aot.sys, 'executable', '/bin/false'):\n    aot.compile_all(['cuda:90'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "ConfigError: compiling for cuda:90 failed" in done.stderr
