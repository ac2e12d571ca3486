"""Tuning of grouped products on a machine whose clock is a fake, and what compilers make of the candidates for GPUs that aren't here."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from kernels.devices import DEVICE, close, randn
from triton.runtime.errors import OutOfResources

from minfer.errors import ConfigError
from minfer.kernels import tune
from minfer.kernels.bench_devices import Call
from minfer.kernels.bench_shapes import SHAPES, Mixture, Shape
from minfer.kernels.ops import Ops
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.aot import TARGETS
from minfer.kernels.triton.moe import GroupedBytes, GroupedCodes, GroupedDense, TritonExperts, block_rows
from minfer.kernels.triton.tuning import Tuning
from minfer.quant import QuantScheme
from minfer.quant.algorithms import round_to_nearest

MIXTURE = Mixture(3, 2)
CONSTANTS = {
    GroupedDense: {"BLOCK_N", "BLOCK_K", "num_warps", "num_stages"},
    GroupedCodes: {"BLOCK_N", "num_warps", "num_stages"},
    GroupedBytes: {"BLOCK_N", "BLOCK_K", "num_warps", "num_stages"},
}


class Fake:
    """Runs nothing, and notes the sizes of steps. What `of` says of the candidates in use is how long a step takes."""

    device = DEVICE
    cache_bytes = 1
    decode_rows = 256
    rounds_inputs = False

    def __init__(self, experts: TritonExperts, of: Any) -> None:
        self.experts, self.of = experts, of
        self.steps: set[str] = set()

    def describe(self) -> dict[str, Any]:
        return {"device": "a fake"}

    def time(self, calls: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, list[float]]:
        self.steps |= set(calls)
        sides = (*self.experts.gate_up, self.experts.down)
        blocks = [self.experts.tuning.blocks(side.class_of(16), side.default_blocks(16)) for side in sides]
        return {name: [self.of(int(name), *blocks)] for name in calls}


def experts(ops: Ops, schemes: tuple[QuantScheme | None, QuantScheme | None] = (None, None)) -> TritonExperts:
    """Of gate_up and down; None: dense."""
    sides = []
    for (n, k), scheme in zip(((128, 128), (128, 64)), schemes, strict=True):
        matrices = [randn(n, k, seed=10 * n + e) for e in range(3)]
        sides.append([ops.prepare(matrix if scheme is None else round_to_nearest(matrix.cpu(), scheme)) for matrix in matrices])
    joined = ops.prepare_experts(*sides)
    assert isinstance(joined, TritonExperts)
    return joined


def table(tuning: Tuning | None = None) -> Ops:
    return Ops([TritonBackend(DEVICE, torch.float32, tuning=tuning)], torch.float32)


def test_the_fastest_over_all_steps_of_a_class_becomes_the_entry() -> None:
    joined = experts(table())

    def taken(tokens: int, gate_up: Mapping[str, int], down: Mapping[str, int]) -> float:
        if gate_up["BLOCK_N"] == 32:
            raise OutOfResources(1, 0, "shared memory")
        assert gate_up == down
        narrow = gate_up["BLOCK_N"] == 64  # twice as slow where steps are long, ten times as fast where they aren't
        return (2000 if narrow else 1000) + gate_up["num_warps"] if tokens == 4 else (1 if narrow else 10)

    machine = Fake(joined, taken)
    found = tune.best_grouped(joined, MIXTURE, [1, 4], machine, 0.0)  # type: ignore[arg-type]
    assert machine.steps == {"1", "4"}
    entry = found["moe dense, 16 rows"]
    assert (entry["BLOCK_N"], entry["num_warps"], entry["source"]) == (64, 4, "measured on a fake")  # their product decides, not their sum


def test_kinds_of_their_own_have_entries_of_their_own_and_the_second_is_sought_with_the_first() -> None:
    joined = experts(table(), (None, QuantScheme("int8", 32, True)))

    def taken(tokens: int, gate_up: Mapping[str, int], down: Mapping[str, int]) -> float:
        if (down["BLOCK_N"], down["num_stages"]) != (64, 3):
            assert gate_up["BLOCK_N"] == 128, "the first kind's entry was forgotten"
        return abs(gate_up["BLOCK_N"] - 128) + abs(down["BLOCK_N"] - 32) + 1.0

    found = tune.best_grouped(joined, MIXTURE, [2], Fake(joined, taken), 0.0)  # type: ignore[arg-type]
    assert {name: entry["BLOCK_N"] for name, entry in found.items()} == {"moe dense, 16 rows": 128, "moe int8 by 32, 16 rows": 32}


def test_nothing_that_can_be_launched_is_an_error() -> None:
    joined = experts(table())

    def taken(*_: Any) -> float:
        raise OutOfResources(1, 0, "registers")

    with pytest.raises(ConfigError, match="none of the block shapes for moe dense, 16 rows"):
        tune.best_grouped(joined, MIXTURE, [2], Fake(joined, taken), 0.0)  # type: ignore[arg-type]


def test_steps_whose_blocks_have_as_many_rows_are_tuned_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[int]]] = []

    def best(joined: TritonExperts, mixture: Mixture, tokens: list[int], *_: Any) -> dict[str, Any]:
        seen.append((joined.down.kind, tokens))
        return {f"{joined.down.kind} {tokens}": {}}

    monkeypatch.setattr(tune, "best_grouped", best)
    monkeypatch.setitem(SHAPES, "mixture", Shape(128, 2, 1, 64, 128, 1000, MIXTURE))
    machine = Fake(None, None)  # type: ignore[arg-type]
    found = tune.tune_moe(machine, torch.float32, "mixture", ("dense", "int8"), (64, 1, 2, 40), 0.0)  # type: ignore[arg-type]
    assert seen == [(kind, steps) for kind in ("dense", "int8 by 32") for steps in ([1, 2], [40], [64])]
    assert len(found) == 6
    assert [block_rows(2 * tokens, 3) for tokens in (1, 2, 40, 64)] == [16, 16, 32, 64]
    with pytest.raises(ConfigError, match="llama2-7b has no experts"):
        tune.tune_moe(machine, torch.float32, "llama2-7b", (), (1,), 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [16, 32, 64])
@pytest.mark.parametrize("kind", CONSTANTS)
def test_candidates_are_of_the_kernels_own_constants_and_begin_with_the_default(kind: type[Any], rows: int) -> None:
    default = kind.default_blocks(None, rows)
    tried = list(tune.candidates(default))
    assert tried[0] == default
    assert len(tried) == len({tuple(sorted(candidate.items())) for candidate in tried}) > 20
    assert all(candidate.keys() == default.keys() == CONSTANTS[kind] for candidate in tried)


@pytest.mark.parametrize(
    ("schemes", "name"),
    [
        ((None, None), "moe dense, 16 rows"),
        ((QuantScheme("int4", 32, True),) * 2, "moe int4 by 32, 16 rows"),
        ((QuantScheme("int8", 128, True, "int8"), QuantScheme("int8", 64, True, "int8")), "moe int8 x int8, 16 rows"),
    ],
)
def test_the_kernels_take_their_entry_or_say_once_that_there_is_none(
    schemes: tuple[QuantScheme | None, QuantScheme | None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    x, logits = randn(2, 128), randn(2, 3, seed=1)
    with caplog.at_level(logging.DEBUG, "minfer.kernels"):
        default, tuned = (
            experts(table(Tuning(entries)), schemes).moe(x, logits, 2, True, "silu", None)
            for entries in ({}, {name: {"BLOCK_N": 32, "num_warps": 2}})
        )
    close(tuned, default, 1e-3)
    said = [record.message.partition(";")[0] for record in caplog.records if record.levelname == "DEBUG"]
    assert said == [f"no tuned block shapes for {name}"]


def test_entries_reach_the_launch() -> None:
    """A constant that the kernel doesn't have is refused, so the entry was read."""
    joined = experts(table(Tuning({"moe dense, 16 rows": {"TILE": 2}})))
    with pytest.raises(ConfigError, match="moe dense, 16 rows TILE, which its kernel doesn't have"):
        joined.moe(randn(2, 128), randn(2, 3), 2, True, "silu", None)


_COMPILE = """
import json, sys
from minfer.kernels import tune
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.aot import SHARED_LIMIT, compile_launch, launches_caught
from minfer.kernels.triton.aot_cases import CASES, DTYPE, META
from minfer.kernels.triton.targets import Target
from minfer.kernels.triton.tuning import Tuning

class Asked(Tuning):
    names = {}
    def blocks(self, name, default):
        self.names[name] = dict(default)
        return super().blocks(name, default)

target, case, found = sys.argv[1], CASES[sys.argv[2]], []
def caught_with(tuning):
    with launches_caught() as caught:
        case(TritonBackend(META, DTYPE, Target(132, target, SHARED_LIMIT[target]), tuning=tuning))
    return next(launch for launch in caught if launch.function.fn.__name__.startswith("grouped"))

caught_with(Asked({}))
((name, default),) = Asked.names.items()
tried = sorted(tune.candidates(default), key=lambda blocks: [blocks[key] for key in ("num_stages", *sorted(blocks))])
for blocks in (tried[0], default, tried[-1]):
    compiled = compile_launch(caught_with(Tuning({name: blocks})), target)
    found.append((name, compiled.metadata.num_warps == blocks["num_warps"], compiled.metadata.shared / SHARED_LIMIT[target]))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["moe, bf16, 64 tokens", "moe, int4, 1024 tokens", "moe, fp8 x fp8, 64 tokens"])
@pytest.mark.parametrize("target", TARGETS)
def test_candidates_compile_and_the_default_fits(target: str, case: str) -> None:
    """The smallest, the default, the largest. What is larger than a device's shared memory fails there to launch, and is left out."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _COMPILE, target, case], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    smallest, default, largest = json.loads(done.stdout)
    assert smallest[0].startswith("moe ") and smallest[1] and default[1] and largest[1]
    assert smallest[2] <= 1 and default[2] <= 1
    assert largest[2] >= default[2]
