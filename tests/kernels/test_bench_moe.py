"""The bench's mixtures of experts: bytes of the experts that are touched, calls that touch others, and tables that take them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernels.devices import DEVICE

from minfer.errors import ConfigError
from minfer.kernels import Ops, select_ops
from minfer.kernels.bench import calls_of
from minfer.kernels.bench_cases import cases
from minfer.kernels.bench_moe import MOE_KINDS, experts_of, moe_cases, routing, touched_by
from minfer.kernels.bench_shapes import SHAPES, Mixture, Shape, Sizes
from minfer.kernels.cpu.library import find
from minfer.kernels.ops import Experts

MIXTURE = Mixture(experts=16, top_k=2)
SHAPE = Shape(hidden=128, heads=2, kv_heads=1, head_dim=64, inner=256, vocab=1000, mixture=MIXTURE)
SIZES = Sizes(SHAPE, torch.float32, torch.device("cpu"), (16,), 64, rounds_inputs=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixture", [MIXTURE, Mixture(256, 8)])
def test_a_routing_is_the_same_in_every_run_and_type_and_has_no_ties(mixture: Mixture, dtype: torch.dtype) -> None:
    logits = routing(mixture, 9)
    assert torch.equal(logits, routing(mixture, 9))
    rounded = logits.to(dtype)
    assert all(len(row.unique()) == mixture.experts for row in rounded)
    assert torch.equal(rounded.topk(mixture.top_k).indices, logits.topk(mixture.top_k).indices)


def test_touched_experts_are_those_that_some_row_chooses() -> None:
    mixture = SHAPES["qwen3-30b-a3b"].mixture
    assert mixture is not None
    found = [touched_by(routing(mixture, rows), mixture) for rows in (1, 8, 512)]
    assert found[0] == 8
    assert 40 < found[1] < 60  # of 128 each is left out by 8 tokens with (1 - 8 / 128)^8 = 60%
    assert found[2] == 128
    assert touched_by(torch.tensor([[0.0, 3, 2, 1], [5, 4, 0, 1]]), Mixture(4, 2)) == 3


def test_bytes_are_those_of_touched_experts_and_operations_those_of_every_pair() -> None:
    by_name = {case.name: case for case in moe_cases(SIZES, 3)}
    touched, weights = touched_by(routing(MIXTURE, 3), MIXTURE), 3 * 128 * 256
    assert 2 < touched < 7
    rows = 4 * 3 * (2 * 128 + 16)
    dense, int4, fp8 = (by_name[f"moe {kind}, {touched} of 16 experts"] for kind in ("dense", "int4-128", "fp8"))
    assert dense.bytes == 4 * touched * weights + rows
    assert int4.bytes == touched * weights * (64 + 4) // 128 + rows  # a group: codes, scale and zero point
    assert fp8.bytes == touched * weights + rows
    assert {case.operations for case in by_name.values()} == {2 * 3 * 2 * weights}
    assert (dense.unit, int4.unit, by_name[f"moe fp8 x fp8, {touched} of 16 experts"].unit) == ("float32", "float32", "fp8")
    assert {case.unit for case in moe_cases(replace(SIZES, rounds_inputs=True), 3) if "int4" in case.name} == {"int8"}
    assert dense.library is None


def test_shapes_without_experts_have_no_mixture_and_mixtures_no_plain_block() -> None:
    plain = {(case.op, case.name.split()[2] if case.op == "linear" else "") for case in cases(replace(SIZES, shape=SHAPES["llama2-7b"]), 2)}
    mixed = {(case.op, case.name.split()[2] if case.op == "linear" else "") for case in cases(SIZES, 2)}
    assert mixed - plain == {("moe", "")}
    assert plain - mixed == {("act_mul", ""), ("linear", "gate_up"), ("linear", "down")}


def test_groups_that_an_expert_does_not_divide_are_left_out() -> None:
    odd = replace(SIZES, shape=replace(SHAPE, inner=192))
    assert [case.name.split(",")[0] for case in moe_cases(odd, 1)] == ["moe dense", "moe fp8", "moe fp8 x fp8"]


class Small:
    """As much of a machine as it takes to make calls."""

    cache_bytes = 1 << 30
    memory = 1 << 40

    def free_bytes(self) -> int:
        return self.memory


def test_calls_share_their_experts_and_touch_as_many_others(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {"reference": select_ops(torch.device("cpu"), torch.float32, "reference")}
    case = next(moe_cases(SIZES, 2))
    seen: list[tuple[Experts, frozenset[int]]] = []

    def moe(x: torch.Tensor, logits: torch.Tensor, experts: Experts, top_k: int, *rest: object) -> None:
        seen.append((experts, frozenset(logits.topk(top_k).indices.flatten().tolist())))

    monkeypatch.setattr(tables["reference"], "moe", moe)
    for call in calls_of(case, tables, Small())["reference"]:  # type: ignore[arg-type]
        call()
    assert len(seen) == 32
    assert len({id(experts) for experts, _ in seen}) == 1
    assert len({len(chosen) for _, chosen in seen}) == 1
    assert len({chosen for _, chosen in seen}) > 16
    assert frozenset().union(*(chosen for _, chosen in seen)) == frozenset(range(16))


def test_all_experts_are_in_memory_once_a_table_however_many_calls_there_are() -> None:
    tables = {"reference": select_ops(torch.device("cpu"), torch.float32, "reference")}
    case, machine = next(moe_cases(SIZES, 2)), Small()
    everything = 4 * 16 * 3 * 128 * 256
    machine.memory = 2 * (everything + 32 * case.memory)
    assert calls_of(case, tables, machine)  # type: ignore[arg-type]
    machine.memory -= 1
    with pytest.raises(ConfigError, match="GiB of memory"):
        calls_of(case, tables, machine)  # type: ignore[arg-type]


def tables() -> dict[str, Ops]:
    from minfer.kernels.triton import TritonBackend

    found = {"triton": Ops([TritonBackend(DEVICE, torch.float32)], torch.float32)}
    return found | ({"cpu": select_ops(torch.device("cpu"), torch.float32, "cpu")} if find() is not None else {})


@pytest.mark.parametrize("kind", MOE_KINDS)
@pytest.mark.parametrize("name", ["triton", "cpu"])
def test_compiled_tables_take_every_kind(name: str, kind: str) -> None:
    ops = tables().get(name)
    if ops is None:
        pytest.skip("the compiled CPU kernels are not built")
    shape = replace(SHAPE, inner=128, mixture=Mixture(3, 2))
    sizes = replace(SIZES, shape=shape, device=DEVICE if name == "triton" else SIZES.device)
    call = next(case for case in moe_cases(sizes, 1) if case.name.startswith(f"moe {kind},")).make(ops)
    assert call is not None
    assert call().shape == (1, 128)


def test_what_a_table_would_dequantise_is_left_out() -> None:
    assert experts_of(select_ops(torch.device("cpu"), torch.float32, "reference"), SIZES, MIXTURE, "int4-128") is None
