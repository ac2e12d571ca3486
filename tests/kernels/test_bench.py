"""The kernel bench: what it counts, what it leaves out, and what it prints; the device is a fake one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from minfer.kernels import select_ops
from minfer.kernels.bench import OPS, Call, main, measure_all, parse
from minfer.kernels.bench_shapes import SHAPES, Mixture, Shape
from minfer.kernels.cpu.library import find

NOT_IN_REFERENCE = {"sample", "likeliest", "logprobs", "forbid"}
CEILINGS = {"bandwidth": 1e9, "float32": 1e9, "int8": 0.0}


class Fake:
    """Runs every call once; a call takes 10 microseconds, the library's 20."""

    device = torch.device("cpu")
    cache_bytes = 1
    decode_rows = 4
    rounds_inputs = False
    memory = 1 << 40

    def describe(self) -> dict[str, Any]:
        return {"device": "fake"}

    def ceilings(self) -> dict[str, float]:
        return CEILINGS

    def free_bytes(self) -> int:
        return self.memory

    def time(self, calls: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, list[float]]:
        for variants in calls.values():
            for call in variants:
                call()
        return {name: [20.0 if name == "library" else 10.0] * 3 for name in calls}


def measure(machine: Fake, *arguments: str) -> dict[str, Any]:
    options = parse(["--device", "cpu", "--dtype", "float32", "--each", "0", "--json", "--shape", "smollm2-135m", *arguments])
    return measure_all(options, machine, {"reference": select_ops(torch.device("cpu"), torch.float32, "reference")}, CEILINGS)


@pytest.fixture(autouse=True)
def mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture of experts that is small enough for tests: 2 of 16."""
    monkeypatch.setitem(SHAPES, "mixture", Shape(128, 2, 1, 64, 128, 1000, Mixture(16, 2)))


def test_every_op_has_a_line_with_its_bytes_operations_and_library() -> None:
    measured = measure(Fake(), "--shape", "smollm2-135m", "mixture", "--rows", "2", "8", "--context", "16")
    assert {entry["op"] for entry in measured["results"]} == set(OPS) - NOT_IN_REFERENCE
    without = {line.split(", ")[2].partition(":")[0] for line in measured["skipped"] if "no backend has a kernel" in line}
    assert {name for name in without if not name.startswith(("linear", "moe"))} == NOT_IN_REFERENCE
    by_name = {(e["rows"], e["case"], e["backend"]): e for e in measured["results"] if e["shape"] == "smollm2-135m"}
    dense = by_name[2, "linear dense o [576,576]", "reference"]
    moved, done = 4 * (576 * 576 + 2 * (576 + 576)), 2 * 2 * 576 * 576
    assert dense["gb_per_s"] == pytest.approx(moved / 10e-6 / 1e9)
    assert dense["tflop_per_s"] == pytest.approx(done / 10e-6 / 1e12)
    assert dense["floor_us"] == pytest.approx(max(moved, done) / 1e3)
    assert dense["library_over_ours"] == 2.0
    decode, prompt = by_name[2, "attention 2x1 over 16", "reference"], by_name[8, "attention 1x8 over 8", "reference"]
    assert decode["gb_per_s"] == pytest.approx(2 * 2 * 16 * 3 * 64 * 4 / 10e-6 / 1e9)
    assert prompt["tflop_per_s"] == pytest.approx(4 * (8 * 9 / 2) * 9 * 64 / 10e-6 / 1e12)
    assert any("linear int4" in line and "no backend has a kernel" in line for line in measured["skipped"])


def test_what_does_not_fit_or_comes_too_late_is_named() -> None:
    small = Fake()
    small.memory = 1 << 20
    measured = measure(small, "--rows", "4", "--context", "32768", "--op", "attention", "rotary_kv")
    assert [entry["op"] for entry in measured["results"]] == ["rotary_kv"]
    assert measured["skipped"] == ["smollm2-135m, 4 rows, attention 4x1 over 32768: needs 0.4 GiB of memory"]
    late = measure(Fake(), "--rows", "1", "--op", "rotary_kv", "--seconds", "1e-9")
    assert late["results"] == []
    assert late["skipped"] == ["smollm2-135m, 1 rows, rotary_kv: out of time"]


@pytest.mark.skipif(find() is None, reason="the compiled CPU kernels are not built")
def test_on_this_machine_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", "--op", "act_mul", "--rows", "1", "--each", "0.001", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert {entry["backend"] for entry in document["results"]} == {"cpu", "reference", "library"}
    assert document["ceilings"]["bandwidth"] > 1e9


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(SystemExit, match="torch sees no CUDA or ROCm device"):
        main(["--device", "cuda"])
