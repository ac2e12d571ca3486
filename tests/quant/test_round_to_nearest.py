"""Round-to-nearest in every element, against float64 brute force and the values other people's code gives to codes."""

from __future__ import annotations

import itertools

import pytest
import torch

from minfer.errors import ConfigError
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.algorithms import round_to_nearest
from minfer.quant.algorithms.grid import grid_of

INTEGERS = [
    QuantScheme(element, size, symmetric)
    for element, size, symmetric in itertools.product(("int8", "int4", "int3", "int2"), (32, 96), (True, False))
]
FLOATS = [
    QuantScheme("fp8_e4m3", 192, True),
    QuantScheme("fp8_e5m2", 192, True),
    QuantScheme("fp4_e2m1", 32, True),
    QuantScheme("fp6_e2m3", 32, True),
    QuantScheme("nf4", 64, True),
]
MICROSCALED = [
    *(
        QuantScheme(element, 32, True, scale_type="e8m0")
        for element in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3", "fp8_e5m2", "int8")
    ),
    QuantScheme("fp4_e2m1", 16, True, scale_type="e4m3"),
]
ALL = [*INTEGERS, *FLOATS, *MICROSCALED]
# Relative error of a normal matrix, about a quarter above what was measured.
TOLERANCE = {"int8": 0.01, "int4": 0.12, "int3": 0.23, "int2": 0.47, "fp8_e4m3": 0.04, "fp8_e5m2": 0.08, "fp6_e2m3": 0.04, "fp6_e3m2": 0.07}


def named(scheme: QuantScheme) -> str:
    return f"{scheme.name}{'' if scheme.symmetric else ', zeros'}"


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(48, 192, generator=torch.Generator().manual_seed(0)) * 0.05


def relative_error(packed: PackedWeight, weight: torch.Tensor) -> float:
    return float((packed.dequantize() - weight).norm() / weight.norm())


@pytest.mark.parametrize("scheme", ALL, ids=named)
def test_every_code_is_the_nearest_value_of_its_group(scheme: QuantScheme, weight: torch.Tensor) -> None:
    """All values of the element, in float64, through `PackedWeight.dequantize`: none lies nearer than the one chosen."""
    packed = round_to_nearest(weight, scheme)
    grid = grid_of(scheme.element, scheme.symmetric)
    codes = torch.arange(-128, 128).to(torch.int8)
    if grid.is_integer:
        codes = codes[(codes >= grid.low) & (codes <= grid.high)]
    elif scheme.element.startswith("fp8"):
        codes = codes[torch.isfinite(codes.view(torch.float8_e4m3fn if "e4m3" in scheme.element else torch.float8_e5m2).float())]
    else:
        codes = torch.arange(64 if "fp6" in scheme.element else 16).to(torch.int8)
    found = (packed.dequantize().double() - weight.double()).abs()
    best = torch.full_like(found, torch.inf)
    for code in codes:
        constant = PackedWeight(torch.full_like(packed.codes, int(code)), packed.scales, packed.mins, scheme, packed.levels)
        best = torch.minimum(best, (constant.dequantize().double() - weight.double()).abs())
    assert (found <= best * (1 + 1e-4) + 1e-7).all()


@pytest.mark.parametrize("scheme", ALL, ids=named)
def test_error_is_that_of_the_width(scheme: QuantScheme, weight: torch.Tensor) -> None:
    assert relative_error(round_to_nearest(weight, scheme), weight) < TOLERANCE.get(scheme.element, 0.13)


@pytest.mark.parametrize("scheme", [*INTEGERS, *FLOATS[2:], *MICROSCALED], ids=named)
def test_the_search_only_helps(scheme: QuantScheme, weight: torch.Tensor) -> None:
    plain = relative_error(round_to_nearest(weight, scheme, search=False), weight)
    assert relative_error(round_to_nearest(weight, scheme), weight) <= plain


def test_importance_moves_the_error_to_inputs_that_matter_less(weight: torch.Tensor) -> None:
    scheme = QuantScheme("int3", 96, False)
    importance = torch.ones(192)
    importance[::8] = 100.0

    def weighted(packed: PackedWeight) -> float:
        return float(((packed.dequantize() - weight).square() * importance).sum())

    assert weighted(round_to_nearest(weight, scheme, importance=importance)) < 0.8 * weighted(round_to_nearest(weight, scheme))


def test_scales_are_of_the_type_that_files_keep(weight: torch.Tensor) -> None:
    floats = round_to_nearest(weight, QuantScheme("int4", 32, False)).scales
    assert torch.equal(floats, floats.half().float())
    powers = round_to_nearest(weight, QuantScheme("fp4_e2m1", 32, True, scale_type="e8m0")).scales
    assert torch.equal(powers.log2(), powers.log2().round())
    nv = round_to_nearest(weight, QuantScheme("fp4_e2m1", 16, True, scale_type="e4m3")).scales
    factor = 2.0 ** torch.floor(torch.log2(448 / nv.max()))
    assert torch.equal((nv * factor).to(torch.float8_e4m3fn).float() / factor, nv)


def test_the_mx_rule_without_search_is_the_specifications() -> None:
    """OCP MX 1.0, 6.3: the shared exponent is floor(log2(largest)) less the element's largest exponent (2 for E2M1)."""
    weight = torch.zeros(1, 32)
    weight[0, 3] = 1.7
    packed = round_to_nearest(weight, QuantScheme("fp4_e2m1", 32, True, scale_type="e8m0"), search=False)
    assert packed.scales.item() == 0.25


@pytest.mark.parametrize("scheme", ALL, ids=named)
def test_zeros_and_tiny_and_huge_weights_stay_finite(scheme: QuantScheme) -> None:
    weight = torch.zeros(4, 192)
    weight[1] = 1e-9
    weight[2] = -3e4
    packed = round_to_nearest(weight, scheme).dequantize()
    assert torch.isfinite(packed).all()
    assert not packed[0].any()
    assert torch.allclose(packed[2], weight[2], rtol=0.15)


def test_one_scale_for_the_matrix(weight: torch.Tensor) -> None:
    packed = round_to_nearest(weight, QuantScheme("fp8_e4m3", 192, True), per_tensor=True)
    assert packed.scales.unique().numel() == 1
    assert float(packed.dequantize().abs().max()) == pytest.approx(float(weight.abs().max()), rel=1e-6)


def test_what_can_not_be_quantised_is_said(weight: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="groups of 128 don't divide 192 inputs; sizes that do are 16, 32, 64"):
        round_to_nearest(weight, QuantScheme("int4", 128, True))
    with pytest.raises(ConfigError, match="not finite"):
        round_to_nearest(weight.clone().fill_(float("nan")), QuantScheme("int4", 32, True))
    with pytest.raises(ConfigError, match="no zero point"):
        round_to_nearest(weight, QuantScheme("fp4_e2m1", 32, False))
    with pytest.raises(ConfigError, match="values that some file lists"):
        round_to_nearest(weight, QuantScheme("table4", 32, True))
