"""Tuning, on a machine whose clock is a fake: which candidate wins, what is written, and what happens without a device."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from kernels.devices import DEVICE
from triton.runtime.errors import OutOfResources

from minfer.kernels import tune
from minfer.kernels.bench_devices import Call
from minfer.kernels.triton import TritonBackend, tuning
from minfer.kernels.triton.linear_codes import TritonCodesWeight
from minfer.kernels.triton.linear_w8a8 import TritonRoundedWeight
from minfer.quant import PackedWeight, QuantScheme


class Fake:
    """Runs nothing. Tiles of 32 columns are fastest, and those of 64 don't fit."""

    device = DEVICE
    cache_bytes = 1
    decode_rows = 256
    rounds_inputs = False

    def __init__(self, weights: Sequence[Any]) -> None:
        self.weights = weights

    def describe(self) -> dict[str, Any]:
        return {"device": "a fake"}

    def ceilings(self) -> dict[str, float]:
        return {}

    def free_bytes(self) -> int:
        return 1 << 40

    def time(self, calls: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, list[float]]:
        blocks = self.weights[0].tuning.blocks(self.weights[0].class_of(1), self.weights[0].default_blocks(1))
        if blocks["BLOCK_N"] == 64:
            raise OutOfResources(1, 0, "registers")
        return {name: [100 - blocks["BLOCK_N"] + blocks["num_warps"] / 100] for name in calls}


def codes(n: int, k: int) -> PackedWeight:
    return PackedWeight(torch.zeros(n, k, dtype=torch.int8), torch.ones(n, k // 32), None, QuantScheme("int4", 32, True))


def test_the_fastest_that_fits_becomes_the_entry(tmp_path: Path) -> None:
    weights = [TritonBackend(DEVICE, torch.float32).prepare(codes(16, k), torch.float32) for k in (128, 256)]
    ((name, entry),) = tune.best_blocks(weights, 1, Fake(weights), 0.0).items()  # type: ignore[arg-type]
    assert name == "linear int4 by 32, 1 row"
    assert (entry["BLOCK_N"], entry["num_warps"], entry["source"]) == (32, 4, "measured on a fake")
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"cuda:80": {"kept": {}}, "cuda:90": {"kept": {}, name: {}}}))
    with mock.patch.object(tuning, "TABLE", file):
        tune.write("cuda:90", {name: entry})
        assert json.loads(file.read_text()) == {"cuda:80": {"kept": {}}, "cuda:90": {"kept": {}, name: entry}}
        assert tuning.Tuning.of("cuda:90").blocks(name, weights[0].default_blocks(1))["BLOCK_N"] == 32


@pytest.mark.parametrize("kind", [TritonCodesWeight, TritonRoundedWeight])
def test_candidates_are_of_the_kernels_own_constants_and_begin_with_the_default(kind: type[Any]) -> None:
    scheme = QuantScheme("int8", 128, True, "int8" if kind is TritonRoundedWeight else "none")
    weight = TritonBackend(DEVICE, torch.float32).prepare(
        PackedWeight(torch.zeros(16, 128, dtype=torch.int8), torch.ones(16, 1), None, scheme), torch.float32
    )
    assert isinstance(weight, kind)
    for rows in (1, 16, 256):
        default = weight.default_blocks(rows)
        tried = list(tune.candidates(default))
        assert tried[0] == default
        assert len(tried) == len({tuple(sorted(candidate.items())) for candidate in tried}) > 20
        assert all(candidate.keys() == default.keys() for candidate in tried)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_device_it_says_so() -> None:
    with pytest.raises(SystemExit, match="needs a CUDA or ROCm device"):
        tune.main([])
