"""Products and embeddings of the Triton backend against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernels.devices import DEVICE, DTYPES, close, randn

from minfer.errors import ConfigError
from minfer.kernels.ops import Ops, Weight
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.linear_codes import TritonCodesWeight
from minfer.kernels.triton.targets import Target
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.elements import LISTED


def prepare(matrix, dtype: torch.dtype, target: Target | None = None) -> Weight:  # type: ignore[no-untyped-def]
    prepared = TritonBackend(DEVICE, dtype, target).prepare(matrix, dtype)
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


def packed(n: int, k: int, element: str, group: int, mins: bool = False, seed: int = 0) -> PackedWeight:
    """Random codes and scales, one group of zeros, fractional minima."""
    generator = torch.Generator().manual_seed(seed)
    low, high = {"int4": (0, 16) if mins else (-8, 8), "int8": (-128, 128), "fp8_e4m3": (0, 256), "fp8_e5m2": (0, 256)}.get(
        element, (0, 16)
    )
    codes = torch.randint(low, high, (n, k), generator=generator)
    if element == "fp8_e4m3":
        codes[codes % 128 == 127] = 3  # no NaN; subnormals and both zeros stay
    if element == "fp8_e5m2":
        codes = codes & 0xBF  # below 2, and so neither infinite nor NaN
    largest = {"int8": 128, "int4": 16, "fp8_e4m3": 448, "fp4_e2m1": 6}.get(element, 1)
    scales = torch.rand(n, k // group, generator=generator) / largest
    scales[0, 0] = 0.0
    least = -torch.rand(n, k // group, generator=generator) if mins else None
    levels = torch.randn(16, generator=generator) if element in LISTED else None
    return PackedWeight(codes.to(torch.uint8).view(torch.int8), scales, least, QuantScheme(element, group, not mins), levels)


ELEMENTS = [("int4", False), ("int4", True), ("int8", False), ("int8", True), ("fp8_e4m3", False), ("fp8_e5m2", False), ("nf4", False)]


def check(matrix: PackedWeight, rows: int, dtype: torch.dtype, target: Target | None = None) -> None:
    n, k = matrix.shape
    x, bias = randn(rows, k + 8, dtype=dtype, seed=1)[:, :k], randn(n, dtype=dtype, seed=2)
    expected = torch.nn.functional.linear(x.double().cpu(), matrix.dequantize(torch.float64), bias.double().cpu())
    got = prepare(matrix, dtype, target).linear(x, bias)
    # The excess of the codes is taken off after the sum: 1024 instead of at most 15 goes through float32's 24 bits.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    close(got, expected, tolerance * k**0.5 / 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("element", "mins"), ELEMENTS)
@pytest.mark.parametrize(("n", "k", "group"), [(9, 32, 32), (3, 160, 32), (20, 640, 128), (70, 192, 64), (5, 200, 200), (4, 1152, 1152)])
@pytest.mark.parametrize("rows", [1, 3, 6])
def test_codes(rows: int, n: int, k: int, group: int, element: str, mins: bool, dtype: torch.dtype) -> None:
    check(packed(n, k, element, group, mins), rows, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("element", "mins"), [("int4", False), ("int4", True), ("fp8_e4m3", False), ("nf4", False)])
@pytest.mark.parametrize(("n", "k", "group"), [(9, 32, 32), (20, 640, 128), (5, 200, 200)])
@pytest.mark.parametrize("rows", [1, 3])
def test_codes_as_cdna_multiplies_by_them(rows: int, n: int, k: int, group: int, element: str, mins: bool, dtype: torch.dtype) -> None:
    """No additions of pairs of 16-bit floats there: sums on the float pipe, and what is too much taken off outside."""
    if DEVICE.type == "cuda" and torch.version.hip is None:
        pytest.skip("on a GPU of NVIDIA's its own way is tested")
    check(packed(n, k, element, group, mins), rows, dtype, Target(4, "hip:gfx942"))


def with_zero_points(matrix: PackedWeight, seed: int = 7) -> PackedWeight:
    zeros = torch.randint(0, 17, matrix.scales.shape, generator=torch.Generator().manual_seed(seed))
    halved = matrix.scales.half().float()
    return dataclasses.replace(matrix, scales=halved, mins=-halved * zeros)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "group"), [(9, 32, 32), (20, 640, 128), (70, 512, 64)])
@pytest.mark.parametrize("rows", [1, 3, 17, 65, 257])
def test_zero_points(rows: int, n: int, k: int, group: int, dtype: torch.dtype) -> None:
    """Minima that are integers times their scale are lifted in the operand, and keep no minimum."""
    matrix = with_zero_points(packed(n, k, "int4", group, True))
    weight = prepare(matrix, dtype)
    assert isinstance(weight, TritonCodesWeight) and weight.mins is None and weight.zeros is not None
    check(matrix, rows, dtype)
    ids = torch.tensor([0, n - 1], device=DEVICE)
    assert torch.equal(weight.embedding(ids).cpu(), matrix.dequantize()[ids.cpu()].to(dtype))


@pytest.mark.parametrize("element", ["int4", "int8", "fp8_e4m3", "fp4_e2m1"])
@pytest.mark.parametrize("rows", [5, 17, 65, 257])
def test_tiles_splits_and_the_dequantised_product(rows: int, element: str) -> None:
    check(packed(66, 1024, element, 128, element.startswith("int")), rows, torch.float16)
    plain = packed(66, 1024, element, 128)
    check(dataclasses.replace(plain, scales=plain.scales.half().float()), rows, torch.float16)  # scales are of x's type


@pytest.mark.parametrize("element", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1"])
def test_every_code_of_a_float(element: str) -> None:
    """Times one, one at a time: nothing may be rounded, subnormals and signs included."""
    count = 16 if element == "fp4_e2m1" else 256
    codes = torch.arange(count)
    codes[{"fp8_e4m3": codes % 128 == 127, "fp8_e5m2": codes % 128 >= 124, "fp4_e2m1": codes < 0}[element]] = 0
    wide = codes.to(torch.uint8).view(torch.int8)[:, None].expand(count, 32).contiguous()
    matrix = PackedWeight(wide, torch.ones(count, 1), None, QuantScheme(element, 32, True))  # type: ignore[arg-type]
    one = torch.zeros(2, 32, device=DEVICE)
    one[:, 5] = 1.0
    weight = prepare(matrix, torch.float32)
    for rows in (one[:1], one):
        assert torch.equal(weight.linear(rows, None)[0].cpu(), matrix.dequantize()[:, 5])


@pytest.mark.parametrize("rows", [1, 4, 300])
def test_act_order_and_power_of_two_scales(rows: int) -> None:
    ordered = dataclasses.replace(
        packed(24, 256, "int4", 64, True), input_order=torch.randperm(256, generator=torch.Generator().manual_seed(3))
    )
    check(ordered, rows, torch.float32)
    matrix = packed(24, 256, "fp4_e2m1", 32)
    powers = torch.exp2(torch.randint(-30, 30, matrix.scales.shape, generator=torch.Generator().manual_seed(4)).float())
    e8m0 = dataclasses.replace(matrix, scales=powers, scheme=dataclasses.replace(matrix.scheme, scale_type="e8m0"))
    x = randn(rows, 256)
    expected = x.double().cpu() @ e8m0.dequantize(torch.float64).T
    got = prepare(e8m0, torch.float32).linear(x, None)
    close(got / expected.abs().max(), expected / expected.abs().max(), 1e-5)


def test_scales_take_two_bytes_where_that_loses_nothing() -> None:
    matrix = packed(40, 256, "int4", 32, True)
    exact = dataclasses.replace(matrix, scales=matrix.scales.half().float(), mins=matrix.mins.half().float())  # type: ignore[union-attr]
    wide, narrow = prepare(matrix, torch.float32), prepare(exact, torch.float32)
    assert wide.nbytes - narrow.nbytes == 2 * 2 * 40 * 8
    assert narrow.nbytes == 40 * 256 // 2 + 2 * 2 * 40 * 8


@pytest.mark.parametrize("element", ["int4", "int8", "fp8_e4m3", "nf4"])
@pytest.mark.parametrize("ordered", [False, True])
def test_embedding_and_packing_of_codes(element: str, ordered: bool) -> None:
    matrix = packed(40, 192, element, 64, element.startswith("int"))
    if ordered:
        matrix = dataclasses.replace(matrix, input_order=torch.randperm(192))
    ids = torch.tensor([3, 39, 0], dtype=torch.int32, device=DEVICE)
    assert torch.equal(prepare(matrix, torch.float32).embedding(ids).cpu(), matrix.dequantize()[ids.long().cpu()])


def test_what_is_declined_is_dequantised_and_said() -> None:
    ops = Ops([TritonBackend(DEVICE, torch.float32)], torch.float32)
    odd = packed(8, 48, "int8", 16)
    x = randn(2, 48)
    close(ops.linear(x, ops.prepare(odd)), x.double().cpu() @ odd.dequantize(torch.float64).T, 1e-4)
    assert ops.chosen["linear[int8 (groups of 16)]"] == "dequantised to float32"


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
