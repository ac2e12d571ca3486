"""The compiled small ops against float64 torch, on every instruction set, over odd shapes and strided rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernels.batches import make_batch, make_cache

from minfer.errors import ConfigError
from minfer.kernels.cpu import CpuBackend

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A result rounded once or twice from float32: relative, in units of the type's epsilon.
EPSILON = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = ((1, 576), (1, 1), (3, 7), (37, 100), (130, 576), (5, 4099), (0, 64))


def rows_of_a_wider_matrix(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width + 5, generator=generator).to(dtype)[:, :width]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(cpu: CpuBackend, shape: tuple[int, int], dtype: torch.dtype, with_residual: bool) -> None:
    x, weight = rows_of_a_wider_matrix(*shape, dtype), rows_of_a_wider_matrix(1, shape[1], dtype, 1)[0].contiguous()
    residual = rows_of_a_wider_matrix(*shape, dtype, 2) if with_residual else None
    out, total = cpu.rms_norm(x, weight, 1e-5, residual)
    expected_total = x if residual is None else x + residual
    assert torch.equal(total, expected_total)
    wide = expected_total.double()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    torch.testing.assert_close(out.double(), expected, rtol=2 * EPSILON[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pair_of_norms_is_two_norms_side_by_side(cpu: CpuBackend, dtype: torch.dtype) -> None:
    a, b = (torch.randn(3, 99, dtype=dtype)[:, :75] for _ in range(2))
    weights = torch.randn(2, 75, dtype=dtype)
    both = cpu.norm_pair(a, weights[0], b, weights[1], 1e-5)
    assert torch.equal(both, torch.cat((cpu.rms_norm(a, weights[0], 1e-5)[0], cpu.rms_norm(b, weights[1], 1e-5)[0]), 1))
    with pytest.raises(ConfigError, match="two tensors of one shape"):
        cpu.norm_pair(a, weights[0], b[:2], weights[1], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (1, 1, 2), (4, 2, 10), (3, 1, 128), (2, 2, 80)])
def test_rotary(cpu: CpuBackend, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    rows = 19
    qkv = rows_of_a_wider_matrix(rows, (heads + 2 * kv_heads) * dim, dtype).view(rows, -1, dim)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    before = qkv.clone()
    positions = torch.randint(0, 50, (rows,), dtype=torch.int32)
    angles = torch.rand(50, dim // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1)
    cpu.rotary(q, k, positions, table)
    first, second = before.double().chunk(2, -1)
    cos, sin = table[positions].double()[:, None].chunk(2, -1)
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    for got, heads_of in ((q, slice(0, heads)), (k, slice(heads, heads + kv_heads))):
        torch.testing.assert_close(got.double(), expected[:, heads_of], rtol=EPSILON[dtype], atol=EPSILON[dtype] * 4)
    assert torch.equal(v, before[:, heads + kv_heads :])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", DTYPES)
def test_write_kv(cpu: CpuBackend, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    batch = make_batch([(5, 37), (1, 16), (40, 40), (1, 17)], 16, 12)
    heads, dim = 3, 20
    cache = make_cache(12, heads, 16, dim, cache_dtype)
    k, v = (rows_of_a_wider_matrix(batch.num_tokens, heads * dim, dtype, seed).view(-1, heads, dim) for seed in (1, 2))
    expected_k, expected_v = cache.k.clone(), cache.v.clone()
    for token, slot in enumerate(batch.slots.tolist()):
        expected_k[slot // 16, :, slot % 16] = k[token]
        expected_v[slot // 16, :, slot % 16] = v[token]
    cpu.write_kv(k, v, cache, batch.slots)
    assert torch.equal(cache.k, expected_k)
    assert torch.equal(cache.v, expected_v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_act_mul(cpu: CpuBackend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = rows_of_a_wider_matrix(shape[0], 2 * shape[1], dtype) * 8
    gate, up = x.double().chunk(2, -1)
    torch.testing.assert_close(cpu.act_mul(x, "silu").double(), F.silu(gate) * up, rtol=EPSILON[dtype], atol=1e-5)


def test_silu_of_extremes(cpu: CpuBackend) -> None:
    gate = torch.tensor([-3e38, -1e4, -90.0, -87.5, -0.0, 0.0, 87.5, 90.0, 1e4, 3e38, float("inf"), float("nan")])
    x = torch.cat((gate, torch.ones_like(gate)))[None]
    expected = F.silu(gate)[None]
    torch.testing.assert_close(cpu.act_mul(x, "silu"), expected, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 49152), (3, 1), (33, 1000), (2, 70001), (0, 10)])
def test_argmax_takes_the_lowest_of_equals(cpu: CpuBackend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits = torch.randint(-20, 20, shape).to(dtype)  # ties everywhere
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    assert cpu.argmax(logits).tolist() == expected


def test_argmax_of_infinities_and_nans(cpu: CpuBackend) -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.zeros(4, 100)
    rows[0] = -inf
    rows[1, 60] = inf
    rows[2, [70, 33]] = nan
    rows[2, 5] = inf
    rows[3, 97:] = nan
    assert cpu.argmax(rows).tolist() == rows.argmax(-1).tolist() == [0, 60, 33, 97]


def test_a_row_does_not_depend_on_its_neighbours(cpu: CpuBackend) -> None:
    x = rows_of_a_wider_matrix(64, 576, torch.bfloat16)
    weight = torch.ones(576, dtype=torch.bfloat16)
    together = cpu.rms_norm(x, weight, 1e-5)[0]
    for row in (0, 1, 31, 63):
        assert torch.equal(cpu.rms_norm(x[row : row + 1], weight, 1e-5)[0][0], together[row])
        assert torch.equal(cpu.act_mul(x[row : row + 1], "silu")[0], cpu.act_mul(x, "silu")[row])


def test_arguments_are_checked(cpu: CpuBackend) -> None:
    x = torch.zeros(4, 8)
    with pytest.raises(ConfigError, match="float64"):
        cpu.rms_norm(x.double(), x[0].double(), 1e-5)
    with pytest.raises(ConfigError, match="contiguous"):
        cpu.argmax(x.t())
    with pytest.raises(ConfigError, match="gelu"):
        cpu.act_mul(x, "gelu")
    with pytest.raises(ConfigError, match="int64"):
        cpu.rotary(x.view(4, 2, 4), x.view(4, 2, 4), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4))
