"""The compiled mixture of experts against float64, on every instruction set, over every kind of matrix and routings that are awkward."""

from __future__ import annotations

import pytest
import torch
from kernels.moe_cases import Matrix, expected, joined, numbers, routing
from kernels.test_cpu_elementwise import EPSILON, rows_of_a_wider_matrix

from minfer.errors import ConfigError, ModelLoadError
from minfer.kernels.cpu import CpuBackend
from minfer.kernels.ops import Ops
from minfer.kernels.reference import ReferenceBackend
from minfer.quant.algorithms import round_to_nearest
from minfer.quant.packed import QuantScheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1, 3, 1, 16, 24), (7, 5, 2, 40, 100), (3, 130, 8, 24, 66), (90, 3, 2, 20, 64)]  # tokens, experts, top-k, inner, width


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    backend: CpuBackend | ReferenceBackend, gate_up: list[Matrix], down: list[Matrix], tokens: int, top_k: int, **how: object
) -> None:
    dtype, kind = how.get("dtype", torch.float32), how.get("kind", "random")
    assert isinstance(dtype, torch.dtype) and isinstance(kind, str)
    ops, width, renormalize = Ops([backend], dtype), down[0].shape[0], tokens % 2 == 0
    x, logits = rows_of_a_wider_matrix(tokens, width, dtype, 1), routing(kind, tokens, len(down)).to(dtype)
    shared = None if tokens == 7 else (rows_of_a_wider_matrix(tokens, width, dtype, 2), rows_of_a_wider_matrix(tokens, 1, dtype, 3))
    got = ops.moe(x, logits, joined(ops, gate_up, down), top_k, renormalize, "silu", shared)
    wanted = expected(x, logits, numbers(gate_up), numbers(down), top_k, renormalize, shared)
    scale = float(wanted.abs().max())
    tolerance = how.get("tolerance", 8 * EPSILON[dtype])
    assert isinstance(tolerance, float)
    torch.testing.assert_close(got.double() / scale, wanted / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "one", "idle", "ties"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense(cpu: CpuBackend, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    check_dense(cpu, shape, kind, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "one", "idle", "ties"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_by_reference(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    check_dense(ReferenceBackend(), shape, kind, dtype)


def check_dense(backend: CpuBackend | ReferenceBackend, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    tokens, experts, top_k, inner, width = shape
    gate_up: list[Matrix] = [randn(2 * inner, width, seed=e, dtype=dtype) for e in range(experts)]
    down: list[Matrix] = [randn(width, inner, seed=1000 + e, dtype=dtype) for e in range(experts)]
    check(backend, gate_up, down, tokens, top_k, dtype=dtype, kind=kind)


@pytest.mark.parametrize(("element", "tolerance"), [("int8", 0.02), ("int4", 0.02), ("fp8_e4m3", 1e-5), ("nf4", 0.03)])
@pytest.mark.parametrize("tokens", [1, 30])
def test_quantised(cpu: CpuBackend, element: str, tolerance: float, tokens: int) -> None:
    """Against the matrices that the codes stand for: what differs is that inputs are rounded to int8, but for 8-bit floats."""
    scheme = QuantScheme(element, 32, element != "int4")  # type: ignore[arg-type]
    gate_up: list[Matrix] = [round_to_nearest(randn(128, 96, seed=e), scheme) for e in range(4)]
    down: list[Matrix] = [round_to_nearest(randn(96, 64, seed=50 + e), scheme) for e in range(4)]
    check(cpu, gate_up, down, tokens, 2, tolerance=tolerance)


def test_gate_and_up_of_two_kinds(cpu: CpuBackend) -> None:
    ops, scheme = Ops([cpu], torch.float32), QuantScheme("int8", 32, True)
    gates: list[Matrix] = [round_to_nearest(randn(40, 96, seed=e), scheme) for e in range(3)]
    ups: list[Matrix] = [randn(40, 96, seed=10 + e) for e in range(3)]
    down: list[Matrix] = [randn(96, 40, seed=20 + e) for e in range(3)]
    experts = ops.prepare_experts([ops.prepare_stack(pair) for pair in zip(gates, ups, strict=True)], [ops.prepare(m) for m in down])
    x, logits = randn(9, 96, seed=1), routing("random", 9, 3)
    stacked = [torch.cat(pair) for pair in zip(numbers(gates), numbers(ups), strict=True)]
    wanted = expected(x, logits, stacked, numbers(down), 2, True)
    torch.testing.assert_close(ops.moe(x, logits, experts, 2, True, "silu").double(), wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))


def test_a_token_does_not_see_its_neighbours(cpu: CpuBackend) -> None:
    ops = Ops([cpu], torch.bfloat16)
    gate_up: list[Matrix] = [randn(64, 96, seed=e, dtype=torch.bfloat16) for e in range(4)]
    experts = joined(ops, gate_up, [randn(96, 32, seed=9 + e, dtype=torch.bfloat16) for e in range(4)])
    x, logits = randn(70, 96, seed=1, dtype=torch.bfloat16), routing("random", 70, 4).bfloat16()
    together = ops.moe(x, logits, experts, 2, True, "silu")
    for rows in (slice(0, 1), slice(5, 9), slice(11, 70)):
        assert torch.equal(ops.moe(x[rows], logits[rows], experts, 2, True, "silu"), together[rows])


def test_routers_that_are_no_numbers_end_in_no_crash(cpu: CpuBackend) -> None:
    ops = Ops([cpu], torch.float32)
    experts = joined(ops, [randn(64, 32, seed=e) for e in range(4)], [randn(32, 32, seed=9 + e) for e in range(4)])
    logits = torch.full((3, 4), float("nan"))
    logits[1] = -float("inf")
    logits[2, 1] = 1.0
    out = ops.moe(randn(3, 32, seed=1), logits, experts, 4, True, "silu")
    assert out.shape == (3, 32) and bool(out.isnan().all())
    assert ops.moe(randn(0, 32, seed=1), logits[:0], experts, 2, True, "silu").shape == (0, 32)


def test_what_it_refuses(cpu: CpuBackend) -> None:
    ops = Ops([cpu], torch.float32)
    gate_up, down = [randn(64, 32, seed=e) for e in range(2)], [randn(32, 32, seed=9 + e) for e in range(2)]
    experts = joined(ops, gate_up, down)
    x, logits = randn(3, 32, seed=1), randn(3, 2, seed=2)
    with pytest.raises(ConfigError, match="knows silu, not 'gelu'"):
        ops.moe(x, logits, experts, 1, True, "gelu")
    with pytest.raises(ConfigError, match=r"router_logits must be contiguous rows \[3, 2\]"):
        ops.moe(x, logits[:, :1], experts, 1, True, "silu")
    with pytest.raises(ConfigError, match="1 to 2 of 2 experts, not to 3"):
        ops.moe(x, logits, experts, 3, True, "silu")
    with pytest.raises(ModelLoadError, match=r"no kernel goes through these experts: cpu: .*packed itself"):
        ops.prepare_experts([ReferenceBackend().prepare(matrix, torch.float32) for matrix in gate_up], [ops.prepare(m) for m in down])  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (3, 1, 10), (9, 3, 128)])
def test_qk_norm(cpu: CpuBackend, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    qkv = rows_of_a_wider_matrix(19, (heads + 2 * kv_heads) * dim, dtype).view(19, -1, dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    before, weights = qkv.double(), (randn(dim, seed=1, dtype=dtype), randn(dim, seed=2, dtype=dtype))
    cpu.qk_norm(q, k, *weights, 1e-6)
    normed = before * torch.rsqrt(before.pow(2).mean(-1, keepdim=True) + 1e-6)
    for got, heads_of, weight in ((q, slice(0, heads), weights[0]), (k, slice(heads, heads + kv_heads), weights[1])):
        torch.testing.assert_close(got.double(), normed[:, heads_of] * weight.double(), rtol=2 * EPSILON[dtype], atol=1e-6)
    assert torch.equal(v.double(), before[:, heads + kv_heads :])
