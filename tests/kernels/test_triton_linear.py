"""Products and embeddings of the Triton backend against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernels.devices import DEVICE, DTYPES, close, randn

from minfer.errors import ConfigError
from minfer.kernels.ops import Ops, Weight
from minfer.kernels.triton import TritonBackend
from minfer.quant import PackedWeight, QuantScheme


def prepare(matrix, dtype: torch.dtype) -> Weight:  # type: ignore[no-untyped-def]
    prepared = TritonBackend(DEVICE, dtype).prepare(matrix, dtype)
    assert isinstance(prepared, Weight), prepared
    return prepared


def linear_tolerance(dtype: torch.dtype, k: int) -> float:
    """Rounding of the output, and of k additions in float32."""
    return 4 * torch.finfo(dtype).eps + 2e-7 * k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 100), (48, 256), (16, 576)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5])
def test_dense(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    matrix, x, bias = randn(n, k, dtype=dtype), randn(rows, k + 8, dtype=dtype, seed=1)[:, :k], randn(n, dtype=dtype, seed=2)
    weight = prepare(matrix, dtype)
    for b in (None, bias):
        expected = torch.nn.functional.linear(x.double(), matrix.double(), None if b is None else b.double())
        close(weight.linear(x, b), expected, linear_tolerance(dtype, k) * k**0.5)


def packed(n: int, k: int, element: str, group: int, mins: bool, seed: int = 0) -> PackedWeight:
    """Random codes and scales, one group of zeros, fractional minima."""
    generator = torch.Generator().manual_seed(seed)
    low, high = {"int4": (0, 16) if mins else (-8, 8), "int8": (-128, 128)}[element]
    codes = torch.randint(low, high, (n, k), generator=generator).to(torch.int8)
    scales = torch.rand(n, k // group, generator=generator) / high
    scales[0, 0] = 0.0
    least = -torch.rand(n, k // group, generator=generator) if mins else None
    return PackedWeight(codes, scales, least, QuantScheme(element, group, not mins))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("element", "mins"), [("int4", False), ("int4", True), ("int8", False), ("int8", True)])
@pytest.mark.parametrize(("n", "k", "group"), [(9, 32, 32), (3, 160, 32), (20, 640, 128), (70, 192, 64), (5, 200, 200), (4, 1152, 1152)])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_grouped(rows: int, n: int, k: int, group: int, element: str, mins: bool, dtype: torch.dtype) -> None:
    matrix, x, bias = packed(n, k, element, group, mins), randn(rows, k + 8, dtype=dtype, seed=1)[:, :k], randn(n, dtype=dtype, seed=2)
    expected = torch.nn.functional.linear(x.double().cpu(), matrix.dequantize(torch.float64), bias.double().cpu())
    got = prepare(matrix, dtype).linear(x, bias)
    # The excess of the codes is taken off after the sum: 1024 instead of at most 15 goes through float32's 24 bits.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    close(got, expected, tolerance * k**0.5 / 4)


@pytest.mark.parametrize("rows", [5, 17, 65])
@pytest.mark.parametrize("element", ["int4", "int8"])
def test_grouped_tiles_and_splits(rows: int, element: str) -> None:
    matrix, x = packed(66, 1024, element, 128, True), randn(rows, 1024, dtype=torch.float16)
    expected = x.double().cpu() @ matrix.dequantize(torch.float64).T
    close(prepare(matrix, torch.float16).linear(x, None), expected, 2e-2)


@pytest.mark.parametrize("element", ["int4", "int8"])
def test_grouped_embedding_and_packing(element: str) -> None:
    matrix = packed(40, 192, element, 64, True)
    ids = torch.tensor([3, 39, 0], dtype=torch.int32, device=DEVICE)
    assert torch.equal(prepare(matrix, torch.float32).embedding(ids).cpu(), matrix.dequantize()[ids.long().cpu()])


def test_what_is_declined_is_dequantised_and_said() -> None:
    ops = Ops([TritonBackend(DEVICE, torch.float32)], torch.float32)
    odd = packed(8, 48, "int8", 16, False)
    x = randn(2, 48)
    close(ops.linear(x, ops.prepare(odd)), x.double().cpu() @ odd.dequantize(torch.float64).T, 1e-4)
    assert ops.chosen["linear[int8 (groups of 16)]"] == "dequantised to float32"
    ordered = dataclasses.replace(packed(8, 64, "int4", 32, True), input_order=torch.arange(64))
    assert "act-order" in str(ops.backends[0].prepare(ordered, torch.float32))


def test_a_row_does_not_see_its_neighbours() -> None:
    weight, x = prepare(randn(24, 512), torch.float32), randn(2, 512, seed=1)
    three = torch.cat((x, x[:1]))
    out = weight.linear(three, None)
    assert torch.equal(out[0], out[2])


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_embedding(ids: torch.dtype) -> None:
    matrix = randn(40, 1100, dtype=torch.float16)
    wanted = torch.tensor([3, 39, 0, 3], dtype=ids, device=DEVICE)
    assert torch.equal(prepare(matrix, torch.float16).embedding(wanted), matrix[wanted.long()])


def test_what_it_refuses() -> None:
    weight = prepare(randn(8, 16), torch.float32)
    with pytest.raises(ConfigError, match=r"multiplies torch.float32 \[T, 16\], not torch.float32 \[1, 8\]"):
        weight.linear(randn(1, 8), None)
    with pytest.raises(ConfigError, match=r"bias must have shape \[8\]"):
        weight.linear(randn(1, 16), randn(16))
    assert "cast it first" in str(TritonBackend(DEVICE, torch.float32).prepare(randn(2, 2).half(), torch.float32))
