"""Parts that arrive one by one, and that may be quantised in different ways, against the dequantised product in float64."""

from __future__ import annotations

import pytest
import torch

from minfer.errors import ConfigError
from minfer.kernels import select_ops
from minfer.kernels.cpu.library import find
from minfer.kernels.ops import Ops, StackedWeight
from minfer.layers import Linear
from minfer.layers.loading import Tensorlike
from minfer.quant import PackedWeight, QuantScheme

INPUTS = 64
PARTS = {"q_proj": 48, "k_proj": 5, "v_proj": 33}


def packed(rows: int, element: str = "int4", order: bool = False) -> PackedWeight:
    codes, scales = torch.randint(0, 16, (rows, INPUTS), dtype=torch.int8), torch.rand(rows, INPUTS // 32).half().float()
    scheme = QuantScheme(element, 32, symmetric=False)  # type: ignore[arg-type]
    return PackedWeight(codes, scales, -8 * scales, scheme, input_order=torch.randperm(INPUTS) if order else None)


def linear(ops: Ops, parts: list[Tensorlike]) -> tuple[Linear, torch.Tensor]:
    """The layer with everything loaded, last part first, and its matrix in float64."""
    layer = Linear(ops, INPUTS, sum(PARTS.values()), device=torch.device("cpu"), bias=True, parts=PARTS)
    slots = layer.slots("attn.", "qkv_proj")
    for name, part in reversed(list(zip(PARTS, parts, strict=True))):
        slots[f"attn.{name}.weight"](part)
        slots[f"attn.{name}.bias"](torch.randn(PARTS[name]))
    dense = [part.dequantize() if isinstance(part, PackedWeight) else part for part in parts]
    return layer, torch.cat(dense).double()


@pytest.fixture(params=["reference", "cpu"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "cpu" and find() is None:
        pytest.skip("the compiled CPU kernels are not built")
    return select_ops(torch.device("cpu"), torch.float32, request.param)


def mixes() -> dict[str, list[Tensorlike]]:
    n = list(PARTS.values())
    return {
        "alike": [packed(rows) for rows in n],
        "dense": [torch.randn(rows, INPUTS) for rows in n],
        "two types": [packed(n[0]), packed(n[1]), packed(n[2], "int8")],
        "the middle differs": [packed(n[0]), packed(n[1], "int8"), packed(n[2])],
        "one is dense": [packed(n[0]), torch.randn(n[1], INPUTS), packed(n[2])],
        "orders differ": [packed(rows, order=True) for rows in n],
    }


@pytest.mark.parametrize("mix", mixes())
def test_parts_quantised_differently_make_one_output(ops: Ops, mix: str) -> None:
    layer, dense = linear(ops, mixes()[mix])
    x = torch.randn(3, INPUTS)
    assert layer.bias is not None
    expected = x.double() @ dense.T + layer.bias.double()
    y = layer(x)
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() < 2e-2 * expected.abs().max()  # what rounding the activations to int8 may cost


@pytest.mark.skipif(find() is None, reason="the compiled CPU kernels are not built")
def test_no_part_is_unpacked() -> None:
    ops = select_ops(torch.device("cpu"), torch.float32, "cpu")
    layer, _ = linear(ops, mixes()["two types"])
    assert isinstance(layer.weight, StackedWeight)
    assert [part.shape[0] for part in layer.weight.parts] == [53, 33]  # q and k are alike: one product
    assert not [how for how in ops.chosen.values() if "dequantised" in how]
    with pytest.raises(ConfigError, match="embeddings"):
        layer.weight.embedding(torch.tensor([0]))
