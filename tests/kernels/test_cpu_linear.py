"""The compiled products against float64, for every instruction set, layout, type of activation and number of rows.

The oracle of int8 mode quantises the activations as the contract says (groups of 32, largest |x| / 127, nearest even) and
multiplies in float64, so that what is left to tolerate is the rounding of a few float32 additions and of the output.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from minfer.errors import ConfigError
from minfer.kernels.cpu import CpuBackend
from minfer.kernels.cpu.weights import LinearKernels
from minfer.kernels.ops import Weight
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.elements import ELEMENT_BITS, decode, has_nonfinite

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 2e-3}
ROWS = 19  # three tiles of the widest instruction set and a rest
SCHEMES = [QuantScheme("int4", 32, True), QuantScheme("int4", 32, False), QuantScheme("int4", 128, False)]
SCHEMES += [QuantScheme("int8", 32, True), QuantScheme("int8", 64, False), QuantScheme("int4", 96, True)]
SCHEMES += [QuantScheme("int4", 16, False), QuantScheme("int8", 16, True), QuantScheme("int8", 48, False), QuantScheme("int3", 24, True)]
SCHEMES += [
    QuantScheme("table4", 32, True),
    QuantScheme("nf4", 64, True),
    QuantScheme("fp4_e2m1", 16, True),
    QuantScheme("table4", 16, False),
]
SCHEMES += [QuantScheme("fp8_e4m3", 32, True), QuantScheme("fp8_e5m2", 128, True), QuantScheme("fp8_e4m3", 48, True)]
SCHEMES += [QuantScheme("table4", 16, False), QuantScheme("fp6_e3m2", 32, True), QuantScheme("fp6_e2m3", 32, True)]
IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
BY_SCHEME = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.element}-g{s.group_size}-{'sym' if s.symmetric else 'affine'}")


def packed(n: int, k: int, scheme: QuantScheme, seed: int = 0, half: bool = True, act_order: bool = False) -> PackedWeight:
    """Every code there is but those that aren't numbers."""
    generator = torch.Generator().manual_seed(seed)
    bits = ELEMENT_BITS[scheme.element]
    signed = scheme.element in ("int3", "int4", "int8") and (scheme.symmetric or bits == 8)
    first = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(first, first + 2**bits, (n, k), generator=generator).to(torch.uint8).view(torch.int8)
    if has_nonfinite(codes, scheme.element):
        codes = torch.where(decode(codes, scheme.element, None).isfinite(), codes, 1)
    groups = (n, k // scheme.group_size)
    scales = torch.rand(groups, generator=generator) * 0.01 + 1e-3
    mins = None if scheme.symmetric else torch.randn(groups, generator=generator) * 0.05
    if half:
        scales, mins = scales.half().float(), None if mins is None else mins.half().float()
    normal = torch.randn(16, generator=generator).sort().values
    levels = {"nf4": normal, "table4": torch.tensor(IQ4, dtype=torch.float32)}.get(scheme.element)
    order = torch.randperm(k, generator=generator) if act_order else None
    return PackedWeight(codes, scales, mins, scheme, levels, order)


def activations(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Rows with a stride of their own, a zero group and an outlier."""
    x = torch.randn(rows, k + 5, generator=torch.Generator().manual_seed(seed)).to(dtype)[:, :k]
    x[0, :32] = 0
    x[-1, -1] = 80
    return x


def rounded_to_int8(x: torch.Tensor, group: int = 32) -> torch.Tensor:
    """The last group may be shorter: what pads it is zero."""
    k = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -k % group)).unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    codes = torch.round(groups * torch.div(torch.tensor(127.0), largest.clamp_min(1e-30)))
    return (codes.double() * largest.double() / 127).flatten(-2)[..., :k]


def met(x: torch.Tensor, weight: PackedWeight, activation: str) -> torch.Tensor:
    """The activations as the matrix meets them, its inputs in their own order."""
    if weight.input_order is not None:
        x = x[:, weight.input_order]
    if activation == "none" or weight.scheme.element in ("fp8_e4m3", "fp8_e5m2", "fp6_e3m2"):
        return x.double()
    size = weight.scheme.group_size
    if size % 16 == 0:
        return rounded_to_int8(x, 32 if size % 32 == 0 else 16)
    return rounded_to_int8(x.unflatten(-1, (-1, size)), 32 if size > 128 else 16).flatten(-2)


def exact(weight: PackedWeight, x: torch.Tensor, activation: str) -> torch.Tensor:
    values = decode(weight.codes, weight.scheme.element, weight.levels).double()
    if weight.scheme.element == "nf4" and x.dtype == torch.bfloat16 and activation == "none":  # a table takes the type that is multiplied
        values = values.bfloat16().double()
    if weight.scheme.element == "nf4" and activation == "int8":
        unit = values.abs().max() / 127
        values = torch.round(values / unit) * unit
    grouped = values.unflatten(-1, (-1, weight.scheme.group_size)) * weight.scales.double()[..., None]
    if weight.mins is not None:
        grouped = grouped + weight.mins.double()[..., None]
    return met(x, weight, activation) @ grouped.flatten(-2).T


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[actual.dtype], f"off by {error:.1e} of the largest value"


def prepared(kernels: LinearKernels, weight: torch.Tensor | PackedWeight, dtype: torch.dtype) -> Weight:
    result = kernels.prepare(weight, dtype)
    assert isinstance(result, Weight), result
    return result


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["int8", "none"])
@BY_SCHEME
def test_quantised_product(cpu: CpuBackend, scheme: QuantScheme, activation: str, dtype: torch.dtype) -> None:
    kernels = LinearKernels(cpu.runtime, activation)  # type: ignore[arg-type]
    for (n, k), half in itertools.product(((1, 384), (45, 768)), (True, False)):
        weight = packed(n, k, scheme, half=half, act_order=half)
        x, bias = activations(ROWS, k, dtype), torch.randn(n).to(dtype)
        expected = exact(weight, x, activation)
        matrix = prepared(kernels, weight, dtype)
        assert_close(matrix.linear(x, None), expected)
        assert_close(matrix.linear(x, bias), expected + bias.double())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dense_product(cpu: CpuBackend, dtype: torch.dtype) -> None:
    kernels = LinearKernels(cpu.runtime)
    for n, k in ((1, 1), (33, 191), (64, 600), (70, 1537)):
        weight = torch.randn(n, k).to(dtype)
        x, bias = torch.randn(ROWS, k + 3).to(dtype)[:, :k], torch.randn(n).to(dtype)
        matrix = prepared(kernels, weight, dtype)
        assert_close(matrix.linear(x, bias), x.double() @ weight.double().T + bias.double())
        ids = torch.tensor([n - 1, 0, n // 2], dtype=torch.int32)
        assert torch.equal(matrix.embedding(ids), weight[ids.long()])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["int8", "none", "dense"])
def test_a_row_is_the_same_bits_in_any_batch(cpu: CpuBackend, kind: str, dtype: torch.dtype) -> None:
    """The number of rows picks tiles, blocks and threads; none of that may show."""
    n, k = 72, 1152
    if kind == "dense":
        matrices = [prepared(LinearKernels(cpu.runtime), torch.randn(n, k).to(dtype), dtype)]
    else:
        kernels = LinearKernels(cpu.runtime, kind)  # type: ignore[arg-type]
        matrices = [prepared(kernels, packed(n, k, scheme, act_order=scheme.group_size == 16), dtype) for scheme in SCHEMES]
    x = activations(700, k, dtype)
    for matrix in matrices:
        everything = matrix.linear(x, None)
        for first, rows in ((0, 1), (699, 1), (3, 2), (5, 4), (100, 6), (7, 7), (650, 50), (0, 513)):
            assert torch.equal(matrix.linear(x[first : first + rows], None), everything[first : first + rows]), (first, rows)


def test_threads_do_not_show(cpu: CpuBackend) -> None:
    x = activations(40, 576, torch.bfloat16)
    weight = packed(200, 576, SCHEMES[1])
    results = [
        prepared(CpuBackend(threads, cpu.runtime.isa).linear_kernels, weight, torch.bfloat16).linear(x, None) for threads in (1, 2, 5)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@BY_SCHEME
def test_embedding_rows(cpu: CpuBackend, scheme: QuantScheme) -> None:
    weight = packed(77, 384, scheme)
    ids = torch.tensor([76, 0, 33, 33])
    for dtype in TOLERANCE:
        rows = prepared(cpu.linear_kernels, weight, dtype).embedding(ids)
        expected = weight.dequantize()[ids]
        assert rows.dtype == dtype
        atol = 0.005 * float(expected.abs().max()) if scheme.element == "nf4" else 1e-4  # int8 mode rounds this table
        torch.testing.assert_close(rows.float(), expected, rtol={torch.float32: 1e-5}.get(dtype, 8e-3), atol=atol)


@pytest.mark.parametrize("activation", ["int8", "none"])
@pytest.mark.parametrize("element", ["int8", "int4", "fp8_e4m3"])
def test_one_scale_a_row_and_odd_widths(cpu: CpuBackend, element: str, activation: str) -> None:
    kernels = LinearKernels(cpu.runtime, activation)  # type: ignore[arg-type]
    for n, k in ((3, 9), (33, 100), (7, 191), (5, 600)):
        weight = packed(n, k, QuantScheme(element, k, True), act_order=True)  # type: ignore[arg-type]
        x = torch.randn(ROWS, k)
        matrix = prepared(kernels, weight, torch.float32)
        assert_close(matrix.linear(x, None), exact(weight, x, activation))
        torch.testing.assert_close(matrix.embedding(torch.tensor([n - 1, 0])), weight.dequantize()[[n - 1, 0]], rtol=1e-5, atol=1e-6)


def test_four_bit_tables_take_four_bits(cpu: CpuBackend) -> None:
    """IQ4_NL and FP4 with float16 scales for 32 inputs: 4.5 bits a weight."""
    for element in ("table4", "fp4_e2m1"):
        weight = packed(64, 512, QuantScheme(element, 32, True))  # type: ignore[arg-type]
        assert prepared(cpu.linear_kernels, weight, torch.float32).nbytes * 8 == 4.5 * 64 * 512


@pytest.mark.parametrize("activation", ["int8", "none"])
def test_special_values_reach_their_row_and_no_other(cpu: CpuBackend, activation: str) -> None:
    kernels = LinearKernels(cpu.runtime, activation)  # type: ignore[arg-type]
    x = activations(8, 64, torch.float32)
    clean = prepared(kernels, packed(40, 64, SCHEMES[1]), torch.float32).linear(x, None)
    x[2, 5], x[4, 40] = float("nan"), float("inf")
    y = prepared(kernels, packed(40, 64, SCHEMES[1]), torch.float32).linear(x, None)
    assert y[2].isnan().all()
    assert not y[4].isfinite().any()
    others = [0, 1, 3, 5, 6, 7]
    assert torch.equal(y[others], clean[others])


def test_no_rows(cpu: CpuBackend) -> None:
    assert prepared(cpu.linear_kernels, packed(40, 64, SCHEMES[0]), torch.float32).linear(torch.empty(0, 64), None).shape == (0, 40)
    assert prepared(cpu.linear_kernels, torch.randn(40, 64), torch.float32).linear(torch.empty(0, 64), None).shape == (0, 40)
    assert prepared(cpu.linear_kernels, torch.randn(40, 64), torch.float32).embedding(torch.empty(0, dtype=torch.int64)).shape == (0, 64)


def test_float16_scales_are_stored_as_such(cpu: CpuBackend) -> None:
    """Q4_1: 4 bits, and 16 + 16 for each 32 codes, is 5 bits a weight; float32 scales cost another one."""
    n, k = 64, 512
    bits = {half: prepared(cpu.linear_kernels, packed(n, k, SCHEMES[1], half=half), torch.float32).nbytes * 8 for half in (True, False)}
    assert bits == {True: 5 * n * k, False: 6 * n * k}


def test_int8_activations_cost_little(cpu: CpuBackend) -> None:
    """Against the matrix dequantised by the formula: exact but for rounding in float32, within a percent or two in int8."""
    weight, x = packed(64, 512, SCHEMES[1]), activations(5, 512, torch.float32)
    expected = x @ weight.dequantize().T
    for activation, tolerance in (("none", 1e-5), ("int8", 2e-2)):
        y = prepared(LinearKernels(cpu.runtime, activation), weight, torch.float32).linear(x, None)  # type: ignore[arg-type]
        assert (y - expected).abs().max() < tolerance * expected.abs().max()


def test_what_is_declined_and_refused(cpu: CpuBackend) -> None:
    kernels = cpu.linear_kernels
    assert "8 inputs or more" in str(kernels.prepare(packed(8, 64, QuantScheme("int4", 4, True)), torch.float32))
    assert "minima" in str(kernels.prepare(packed(8, 64, QuantScheme("fp8_e4m3", 32, False)), torch.float32))
    damaged = dataclasses.replace(packed(8, 64, QuantScheme("fp8_e4m3", 32, True)), codes=torch.full((8, 64), 127, dtype=torch.int8))
    assert "finite" in str(kernels.prepare(damaged, torch.float32))
    assert "cast it first" in str(kernels.prepare(torch.randn(8, 64), torch.bfloat16))
    assert "float64" in str(kernels.prepare(torch.randn(8, 64).double(), torch.float64))
    matrix = prepared(kernels, packed(8, 64, SCHEMES[0]), torch.float32)
    with pytest.raises(ConfigError, match="rows of 64"):
        matrix.linear(torch.randn(2, 32), None)
    with pytest.raises(ConfigError, match="bias"):
        matrix.linear(torch.randn(2, 64), torch.randn(8).half())
    with pytest.raises(ConfigError, match="token ids"):
        matrix.embedding(torch.tensor([0.5]))
    with pytest.raises(ConfigError, match="activation"):
        LinearKernels(cpu.runtime, "int7")  # type: ignore[arg-type]
