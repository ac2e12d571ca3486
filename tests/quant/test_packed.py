"""The type itself: what its elements decode to, what may be widened without loss, orders of inputs, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from formats import NF4

from minfer.errors import ModelLoadError
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.elements import ELEMENT_BITS, TABLES, decode

INTEGERS = {"int2": (-2, 1), "int3": (-4, 3), "int4": (-8, 7), "int8": (-128, 127)}


def sample(element: Any, group: int = 32, *, symmetric: bool = True, n: int = 6, k: int = 96, **scheme: Any) -> PackedWeight:
    """Random codes of an element, and random float16 scales."""
    rng = torch.Generator().manual_seed(ELEMENT_BITS[element])
    low, high = INTEGERS.get(element, (0, 2 ** ELEMENT_BITS[element] - 1)) if symmetric else (0, 2 ** ELEMENT_BITS[element] - 1)
    codes = torch.randint(low, high + 1, (n, k), generator=rng)
    if element.startswith("fp8"):
        codes = (
            torch.randn(n, k, generator=rng).to(getattr(torch, f"float8_{element[4:]}{'fn' if 'e4m3' in element else ''}")).view(torch.int8)
        )
    scales, mins = (torch.randn(n, k // group, generator=rng).half().float() for _ in range(2))
    levels = NF4 if element in ("nf4", "table4") else None
    return PackedWeight(codes.to(torch.int8), scales, None if symmetric else mins, QuantScheme(element, group, symmetric, **scheme), levels)


def test_small_floats_are_those_of_the_ocp_specifications() -> None:
    """E2M1 has these values and no others; the 6-bit formats' largest, smallest normal and smallest subnormal are given there."""
    assert TABLES["fp4_e2m1"][:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    for element, largest, normal, subnormal in (("fp6_e2m3", 7.5, 1.0, 0.125), ("fp6_e3m2", 28.0, 0.25, 0.0625)):
        positive = TABLES[element][:32]
        assert (max(positive), positive[1]) == (largest, subnormal)
        assert positive[2 ** int(element[-1])] == normal
        assert list(positive) == sorted(positive)
        assert TABLES[element][32:] == tuple(-value for value in positive)


@pytest.mark.parametrize(("element", "kind"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_all_fp8_codes_decode_as_torch_does(element: Any, kind: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8)
    expected = codes.view(kind).float()
    assert torch.equal(decode(codes.view(torch.int8), element, None).nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


@pytest.mark.parametrize("element", ELEMENT_BITS)
def test_dequantised_values_follow_the_formula(element: Any) -> None:
    packed = sample(element)
    values = decode(packed.codes, element, packed.levels)
    for n, k in itertools.product(range(6), range(0, 96, 7)):
        assert packed.dequantize()[n, k] == values[n, k] * packed.scales[n, k // 32]


@pytest.mark.parametrize("element", ELEMENT_BITS)
def test_widening_changes_no_value(element: Any) -> None:
    wide = sample(element).widened()
    assert wide.scheme.element == {"int2": "int4", "int3": "int4", "fp6_e2m3": "int8", "fp6_e3m2": "fp8_e4m3"}.get(element, element)
    assert torch.equal(wide.dequantize(), sample(element).dequantize())


@pytest.mark.parametrize("element", ["int2", "int3", "int4", "int8"])
def test_widening_with_minima_changes_no_value(element: Any) -> None:
    packed = sample(element, symmetric=False)
    assert torch.equal(packed.widened().dequantize(), packed.dequantize())


def test_inputs_in_another_order() -> None:
    packed = sample("int4")
    order = torch.randperm(96)
    ordered = dataclasses.replace(packed, input_order=order)
    x = torch.randn(3, 96, dtype=torch.float64)
    torch.testing.assert_close(x @ ordered.dequantize().double().T, x[:, order] @ packed.dequantize().double().T)
    assert torch.equal(ordered.rows(torch.tensor([4, 1])).dequantize(), ordered.dequantize()[[4, 1]])
    both = PackedWeight.concatenate([ordered, ordered])
    assert torch.equal(both.dequantize(), torch.cat([ordered.dequantize()] * 2))
    with pytest.raises(ModelLoadError, match="orders of inputs"):
        PackedWeight.concatenate([ordered, packed])


def test_tables_that_differ_cannot_be_stacked() -> None:
    packed = sample("nf4")
    assert packed.table is not None
    assert packed.table[0] == -1.0
    with pytest.raises(ModelLoadError, match="levels"):
        PackedWeight.concatenate([packed, dataclasses.replace(packed, levels=NF4 * 2)])


@pytest.mark.parametrize(
    ("element", "group", "scale_type", "name"),
    [
        ("fp4_e2m1", 32, "e8m0", "mxfp4"),
        ("fp6_e3m2", 32, "e8m0", "mxfp6"),
        ("fp8_e4m3", 32, "e8m0", "mxfp8"),
        ("int8", 32, "e8m0", "mxint8"),
        ("fp4_e2m1", 16, "e4m3", "nvfp4"),
        ("int4", 128, "float", "int4 (groups of 128)"),
    ],
)
def test_names_of_schemes(element: Any, group: int, scale_type: Any, name: str) -> None:
    assert QuantScheme(element, group, True, scale_type=scale_type).name == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheme": QuantScheme("int4", 64, True)}, "groups of 64"),
        ({"scheme": QuantScheme("int4", 0, True)}, "groups of 0"),
        ({"scheme": QuantScheme("int5", 32, True)}, "'int5'"),  # type: ignore[arg-type]
        ({"scheme": QuantScheme("nf4", 32, True)}, "levels"),
        ({"levels": NF4}, "levels"),
        ({"scales": torch.ones(6, 2)}, "scales"),
        ({"mins": torch.ones(5, 3)}, "mins"),
        ({"input_order": torch.arange(95)}, "order"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        dataclasses.replace(sample("int4"), **change)
