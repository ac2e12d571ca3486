"""Mixtures of experts on the Triton kernels against float64: routing, sorting, and the grouped products of every kind of matrix."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from kernels.devices import DEVICE, DTYPES, close, randn
from kernels.moe_cases import Matrix, expected, joined, numbers, routing
from kernels.test_triton_linear import packed, with_zero_points

from minfer.errors import ConfigError, ModelLoadError
from minfer.kernels.ops import Ops
from minfer.kernels.reference.moe import route as reference_route
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.linear_w8a8 import TritonRoundedWeight
from minfer.kernels.triton.moe import block_rows
from minfer.kernels.triton.moe_route import UNSORTED_PAIRS, route, sort_by_expert
from minfer.kernels.triton.targets import Target
from minfer.quant import PackedWeight, QuantScheme

ROUTINGS = ["random", "one", "idle", "ties"]


def table(dtype: torch.dtype, target: Target | None = None, activations: str = "auto") -> Ops:
    return Ops([TritonBackend(DEVICE, dtype, target, activations)], dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 3, 1), (3, 60, 4), (5, 128, 8), (4, 4, 4)])
def test_route(tokens: int, experts: int, top_k: int, renormalize: bool, kind: str) -> None:
    logits = routing(kind, tokens, experts).to(DEVICE)
    chosen, shares = route(logits, top_k, renormalize)
    wanted, weights = reference_route(logits.double().cpu(), top_k, renormalize)
    assert chosen.cpu().tolist() == wanted.tolist()
    close(shares, weights, 1e-5)


def test_what_is_no_number_is_chosen_last_and_never_twice() -> None:
    logits = torch.tensor([[float("nan"), 1.0, float("-inf"), 2.0], [float("-inf")] * 4], device=DEVICE)
    chosen, _ = route(logits, 4, True)
    assert chosen.cpu().tolist() == [[3, 1, 0, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rows", "kind"),
    [
        (17, 8, 1, 16, "idle"),
        (17, 2, 1, 16, "one"),  # the last pair begins a block
        (40, 5, 2, 16, "random"),
        (700, 3, 2, 64, "random"),
        (9, 20, 8, 32, "ties"),
        (20, 3, 2, 16, "one"),
    ],
)
def test_sorted_blocks_hold_each_pair_once_and_one_expert_each(tokens: int, experts: int, top_k: int, rows: int, kind: str) -> None:
    chosen, _ = route(routing(kind, tokens, experts).to(DEVICE), top_k, False)
    blocks, pairs = sort_by_expert(chosen, experts, rows), tokens * top_k
    assert pairs > UNSORTED_PAIRS and blocks.pairs is not None
    of_pair, found = chosen.flatten().tolist(), []
    used = [expert for expert in blocks.experts.tolist() if expert >= 0]
    assert used == sorted(used) and blocks.experts.tolist()[len(used) :] == [-1] * (blocks.count - len(used))
    for expert, own in zip(used, blocks.pairs.view(-1, rows).tolist(), strict=False):
        real = [pair for pair in own if pair != pairs]
        assert real and own[: len(real)] == real, "padding comes last"
        assert {of_pair[pair] for pair in real} == {expert}
        found += real
    assert sorted(found) == list(range(pairs))
    assert found == sorted(found, key=lambda pair: (of_pair[pair], pair)), "the same lists whenever it runs"


def test_few_pairs_are_blocks_of_their_own() -> None:
    chosen = torch.tensor([[3, 1]], dtype=torch.int32, device=DEVICE)
    blocks = sort_by_expert(chosen, 8, 16)
    assert blocks.count == 2 and blocks.pairs is None and blocks.experts is chosen


@pytest.mark.parametrize(("pairs", "experts", "rows"), [(1, 8, 16), (512, 128, 16), (600, 8, 64), (100, 4, 32), (10**6, 8, 64)])
def test_rows_of_a_block_follow_what_an_expert_gets(pairs: int, experts: int, rows: int) -> None:
    assert block_rows(pairs, experts) == rows


def check(
    gate_up: list[Matrix],
    down: list[Matrix],
    tokens: int,
    top_k: int,
    dtype: torch.dtype,
    tolerance: float,
    kind: str = "random",
    renormalize: bool = True,
    with_shared: bool = False,
    target: Target | None = None,
) -> None:
    ops, width = table(dtype, target), down[0].shape[0]
    x = randn(tokens, width + 8, dtype=dtype, seed=1)[:, :width]
    logits = routing(kind, tokens, len(down)).to(dtype).to(DEVICE)
    shared = (randn(tokens, width, dtype=dtype, seed=2), randn(tokens, 1, dtype=dtype, seed=3)) if with_shared else None
    experts = joined(ops, gate_up, down)
    assert ops.chosen["moe"] == "triton"
    got = ops.moe(x, logits, experts, top_k, renormalize, "silu", shared)
    cpu = None if shared is None else (shared[0].cpu(), shared[1].cpu())
    wanted = expected(x.cpu(), logits.cpu(), numbers(gate_up), numbers(down), top_k, renormalize, cpu)
    scale = float(wanted.abs().max()) or 1.0
    close(got / scale, wanted / scale, tolerance)


TOLERANCES = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "inner", "width", "kind"),
    [
        (1, 3, 1, 16, 24, "random"),
        (1, 20, 18, 16, 24, "random"),  # one token, and more pairs than are left unsorted
        (7, 5, 2, 40, 100, "one"),
        (5, 4, 4, 16, 32, "random"),
        (33, 4, 1, 16, 32, "one"),  # all tokens at one expert, whose last block has one
        (20, 12, 8, 24, 130, "random"),
        (21, 5, 2, 16, 64, "idle"),
        (20, 4, 1, 16, 64, "ties"),
        (70, 3, 2, 20, 64, "one"),
    ],
)
def test_dense(tokens: int, experts: int, top_k: int, inner: int, width: int, kind: str, dtype: torch.dtype) -> None:
    gate_up = [randn(2 * inner, width, dtype=dtype, seed=10 + e) for e in range(experts)]
    down = [randn(width, inner, dtype=dtype, seed=50 + e) for e in range(experts)]
    check(gate_up, down, tokens, top_k, dtype, TOLERANCES[dtype], kind, renormalize=tokens % 2 == 0, with_shared=tokens != 7)


def packed_experts(
    count: int, inner: int, width: int, element: str, group: int, mins: bool
) -> tuple[list[PackedWeight], list[PackedWeight]]:
    gate_up = [packed(2 * inner, width, element, group if width % group == 0 else width, mins, seed=e) for e in range(count)]
    down = [packed(width, inner, element, group if inner % group == 0 else inner, mins, seed=40 + e) for e in range(count)]
    levels = gate_up[0].levels  # a table is the same for all of a checkpoint's matrices
    return [dataclasses.replace(m, levels=levels) for m in gate_up], [dataclasses.replace(m, levels=levels) for m in down]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize(
    ("element", "group", "mins"),
    [
        ("int4", 32, True),
        ("int4", 128, False),
        ("int8", 64, False),
        ("int8", 32, True),
        ("fp8_e4m3", 4096, False),
        ("nf4", 64, False),
        ("fp4_e2m1", 32, False),
    ],
)
def test_codes(element: str, group: int, mins: bool, tokens: int, dtype: torch.dtype) -> None:
    gate_up, down = packed_experts(4, 96, 128, element, group, mins)
    check([*gate_up], [*down], tokens, 2, dtype, TOLERANCES[dtype], "idle")


@pytest.mark.parametrize("tokens", [2, 40])
def test_integer_zero_points_some_of_which_are_too_large_to_be_lifted(tokens: int) -> None:
    """One expert keeps minima, so all do: what was a zero point comes back exactly."""
    gate_up, down = packed_experts(3, 64, 64, "int4", 32, True)
    lifted = [with_zero_points(matrix, seed) for seed, matrix in enumerate(gate_up)]
    check([*lifted], [*down], tokens, 2, torch.float16, TOLERANCES[torch.float16])
    check([lifted[0], gate_up[1], lifted[2]], [*down], tokens, 2, torch.float32, TOLERANCES[torch.float32])


@pytest.mark.parametrize("tokens", [3, 30])
def test_as_cdna_multiplies(tokens: int) -> None:
    if DEVICE.type == "cuda" and torch.version.hip is None:
        pytest.skip("on a GPU of NVIDIA's its own way is tested")
    gate_up, down = packed_experts(3, 64, 64, "int4", 32, True)
    check([*gate_up], [*down], tokens, 2, torch.float32, TOLERANCES[torch.float32], target=Target(4, "hip:gfx942"))


def rounded(weight: TritonRoundedWeight, rows: torch.Tensor) -> torch.Tensor:
    codes, scales = weight.quantize_rows(rows.contiguous())
    return (codes.float().view(rows.shape[0], scales.shape[1], -1) * scales[:, :, None]).view(rows.shape).double().cpu()


@pytest.mark.parametrize("tokens", [2, 30])
@pytest.mark.parametrize(("element", "group"), [("int8", 256), ("fp8_e4m3", 256), ("fp8_e4m3", 128)])
def test_rows_rounded_to_8_bits(element: Literal["int8", "fp8_e4m3"], group: int, tokens: int) -> None:
    """Against float64 over rows that are rounded as `quantize_rows` does, which test_triton_w8a8.py holds against the exact ones.

    So nothing is left but float32's sums. Against the exact product it would be 0.06 of the largest output with e4m3's three bits of
    mantissa, and up to 0.16 with what the interpreter makes of them: it loses a carry in 2 numbers of 100, which come out as half. On a
    GPU an exponential that differs in the last place may move a code of the second product's rows by one, which is 0.02.
    """
    scheme = QuantScheme(element, group, True, "int8" if element == "int8" else "fp8")
    gate_up, down = ([dataclasses.replace(m, scheme=scheme) for m in side] for side in packed_experts(3, 256, 256, element, group, False))
    ops, x, logits = table(torch.float32), randn(tokens, 264, seed=1)[:, :256], routing("random", tokens, 3)
    weights = [[ops.prepare(matrix) for matrix in side] for side in (gate_up, down)]
    got = ops.moe(x, logits.to(DEVICE), ops.prepare_experts(*weights), 2, True, "silu").double().cpu()
    chosen, shares = reference_route(logits.double(), 2, True)
    wanted = torch.zeros(tokens, 256, dtype=torch.float64)
    for expert, (first, last) in enumerate(zip(*weights, strict=True)):
        assert isinstance(first, TritonRoundedWeight) and isinstance(last, TritonRoundedWeight)
        gate, up = (rounded(first, x) @ gate_up[expert].dequantize(torch.float64).T).chunk(2, dim=1)
        inner = (gate / (1 + torch.exp(-gate)) * up).float().to(DEVICE)
        y = rounded(last, inner) @ down[expert].dequantize(torch.float64).T
        token, place = torch.where(chosen == expert)
        wanted[token] += shares[token, place, None] * y[token]
    scale = float(wanted.abs().max())
    torch.testing.assert_close(got / scale, wanted / scale, rtol=0, atol=2e-6 if DEVICE.type == "cpu" else 2e-2)


def test_the_activation_rounds_for_the_product_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are rounded in a launch of their own for gate and up alone."""
    scheme, seen = QuantScheme("int8", 64, True, "int8"), []
    gate_up, down = ([dataclasses.replace(m, scheme=scheme) for m in side] for side in packed_experts(2, 64, 64, "int8", 64, False))
    ops, quantize = table(torch.float32), TritonRoundedWeight.quantize_rows
    monkeypatch.setattr(TritonRoundedWeight, "quantize_rows", lambda self, x: seen.append(x.shape[0]) or quantize(self, x))
    ops.moe(randn(9, 64), randn(9, 2), joined(ops, [*gate_up], [*down]), 2, True, "silu")
    assert seen == [9], "a token's row once, for all of its experts"


def test_gate_and_up_of_two_kinds() -> None:
    """A GGUF file may mix types inside a layer: two products write into one output."""
    ops = table(torch.float32)
    gates = [packed(32, 64, "int8", 32, seed=e) for e in range(3)]
    ups = [packed(32, 64, "int4", 32, True, seed=9 + e) for e in range(3)]
    downs = [randn(64, 32, seed=20 + e) for e in range(3)]
    experts = ops.prepare_experts([ops.prepare_stack(pair) for pair in zip(gates, ups, strict=True)], [ops.prepare(m) for m in downs])
    x, logits = randn(25, 64), routing("random", 25, 3).to(DEVICE)
    stacked = [torch.cat(pair) for pair in zip(numbers(gates), numbers(ups), strict=True)]
    wanted = expected(x.cpu(), logits.cpu(), stacked, numbers(downs), 2, True)
    close(ops.moe(x, logits, experts, 2, True, "silu") / 100, wanted / 100, 1e-4)


def test_a_token_does_not_see_its_neighbours() -> None:
    ops = table(torch.float32)
    experts = joined(ops, [randn(48, 40, seed=e) for e in range(4)], [randn(40, 24, seed=9 + e) for e in range(4)])
    x, logits = randn(30, 40), routing("random", 30, 4).to(DEVICE)
    together = ops.moe(x, logits, experts, 2, True, "silu")
    for rows in (slice(0, 1), slice(3, 9), slice(11, 30)):
        assert torch.equal(ops.moe(x[rows], logits[rows], experts, 2, True, "silu"), together[rows])


JUNK = [float("nan"), float("inf"), float("-inf"), 1e30]


@pytest.mark.parametrize("weights", ["dense", "codes", "bytes"])
@pytest.mark.parametrize(("real", "padded"), [(13, 20), (5, 8)])
def test_rows_of_padding_reach_no_other(real: int, padded: int, weights: str) -> None:
    """A bucket of a CUDA graph: behind the step's rows lie others, in which anything may be, and whose router says anything. The same bits,
    sorted (40 pairs) and not (16), with and without them.
    """
    ops = table(torch.float32)
    gate_up: list[Matrix] = [randn(192, 128, seed=e) for e in range(4)]
    down: list[Matrix] = [randn(128, 96, seed=9 + e) for e in range(4)]
    if weights != "dense":
        of_codes = packed_experts(4, 128, 128, "int8", 128, False)
        scheme = QuantScheme("int8", 128, True, "int8" if weights == "bytes" else "none")
        gate_up, down = ([dataclasses.replace(m, scheme=scheme) for m in side] for side in of_codes)
    experts = joined(ops, gate_up, down)
    x, logits = randn(padded, 128), routing("random", padded, 4).to(DEVICE)
    shared = randn(padded, 128, seed=3), randn(padded, 1, seed=4)
    alone = ops.moe(x[:real], logits[:real], experts, 2, True, "silu", (shared[0][:real], shared[1][:real]))
    assert alone.isfinite().all()
    chosen, shares = route(logits[:real], 2, True)
    for row in range(real, padded):
        junk = JUNK[row % len(JUNK)]
        x[row, row % 3 :: 3] = junk
        logits[row, row % 2 :: 2] = junk
        shared[0][row], shared[1][row] = junk, junk
    logits[real] = x[real] = float("nan")
    assert torch.equal(ops.moe(x, logits, experts, 2, True, "silu", shared)[:real], alone)
    among, of_all = route(logits, 2, True)
    assert torch.equal(among[:real], chosen) and torch.equal(of_all[:real], shares)
    assert ((among >= 0) & (among < 4)).all() and (among[:, 0] != among[:, 1]).all(), "rows of padding, too, are someone's, once each"
    blocks = sort_by_expert(among, 4, block_rows(2 * padded, 4))
    if blocks.pairs is not None:
        for expert in range(4):
            pairs = blocks.pairs.view(-1, blocks.rows)[(blocks.experts == expert).to(DEVICE)].flatten().tolist()
            own = [pair for pair in pairs if pair < 2 * real]
            assert own == [pair for pair, of in enumerate(chosen.flatten().tolist()) if of == expert]


def test_no_token() -> None:
    ops = table(torch.float32)
    experts = joined(ops, [randn(8, 16), randn(8, 16)], [randn(16, 4), randn(16, 4)])
    assert ops.moe(randn(0, 16), randn(0, 2), experts, 1, True, "silu").shape == (0, 16)
    assert experts.nbytes == 2 * (8 * 16 + 16 * 4) * 4


def test_what_it_refuses() -> None:
    ops = table(torch.float32)
    ordered = [dataclasses.replace(packed(32, 64, "int4", 32, True), input_order=torch.randperm(64)) for _ in range(2)]
    with pytest.raises(ModelLoadError, match=r"no kernel goes through these experts: triton: .*act-order"):
        joined(ops, [*ordered], [randn(64, 16), randn(64, 16)])
    for first in ([packed(32, 64, "int8", 32), packed(32, 64, "int8", 64)], [packed(32, 64, "int8", 32), randn(32, 64)]):
        with pytest.raises(ModelLoadError, match="quantised alike"):
            joined(ops, first, [randn(64, 16), randn(64, 16)])
    with pytest.raises(ModelLoadError, match=r"behind gate and up of \[\[32, 64\]\] there can't be down of \[64, 8\]"):
        joined(ops, [randn(32, 64), randn(32, 64)], [randn(64, 8), randn(64, 8)])
    with pytest.raises(ModelLoadError, match="every expert needs a down matrix"):
        joined(ops, [randn(32, 64), randn(32, 64)], [randn(64, 16)])
    experts = joined(ops, [randn(8, 16), randn(8, 16)], [randn(16, 4), randn(16, 4)])
    x, logits = randn(1, 16), randn(1, 2)
    with pytest.raises(ConfigError, match="1 to 2 of 2 experts, not to 3"):
        ops.moe(x, logits, experts, 3, True, "silu")
    with pytest.raises(ConfigError, match=r"router_logits must have shape \[1, 2\]"):
        ops.moe(x, randn(1, 3), experts, 1, True, "silu")
    with pytest.raises(ConfigError, match=r"multiplies torch.float32 \[T, 16\], not torch.float16 \[1, 16\]"):
        ops.moe(x.half(), logits.half(), experts, 1, True, "silu")
    with pytest.raises(ConfigError, match=r"multiplies torch.float32 \[T, 16\], not torch.float32 \[1, 24\]"):
        ops.moe(randn(1, 24), logits, experts, 1, True, "silu")
    with pytest.raises(ConfigError, match=r"router_logits must be torch\.float32 as its companion is, not torch\.float16"):
        ops.moe(x, logits.half(), experts, 1, True, "silu")
    with pytest.raises(ConfigError, match=r"the shared expert's gate must have shape \[1, 1\]"):
        ops.moe(x, logits, experts, 1, True, "silu", (x, randn(1, 16)))
    with pytest.raises(ConfigError, match="knows silu, not 'gelu'"):
        ops.moe(x, logits, experts, 1, True, "gelu")
