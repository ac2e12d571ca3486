"""Products of 8-bit rows with 8-bit matrices against float64, and which matrices get them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from kernels.batches import make_batch
from kernels.devices import DEVICE, DTYPES, close, moved, randn

from minfer.config import Activations
from minfer.kernels import Ops
from minfer.kernels.ops import RoundedRows
from minfer.kernels.triton import TritonBackend, linear_w8a8
from minfer.kernels.triton.act_mul import act_mul
from minfer.kernels.triton.codes import E4M3_FNUZ
from minfer.kernels.triton.linear_codes import TritonCodesWeight, unpack
from minfer.kernels.triton.linear_w8a8 import TritonRoundedWeight
from minfer.kernels.triton.rms_norm import rms_norm
from minfer.kernels.triton.targets import Target
from minfer.kernels.triton.tuning import Tuning
from minfer.kvcache import KVCache
from minfer.layers.linear import Linear
from minfer.layers.loading import load_weights
from minfer.model_config import ModelConfig
from minfer.models import create_model
from minfer.quant import PackedWeight, QuantScheme

# The package has functions of these names.
act_mul_file, rms_norm_file = (importlib.import_module(f"minfer.kernels.triton.{name}") for name in ("act_mul", "rms_norm"))
SETTINGS: tuple[Activations, ...] = ("auto", "int8", "none")
ELEMENTS: tuple[Literal["int8", "fp8_e4m3"], ...] = ("int8", "fp8_e4m3")


def packed(n: int, k: int, element: Literal["int8", "fp8_e4m3"], group: int, seed: int = 0) -> PackedWeight:
    """Random codes; one group of zeros."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), generator=generator)
    if element == "fp8_e4m3":
        codes = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn).view(torch.int8)
    scales = torch.rand(n, k // group, generator=generator) / (128 if element == "int8" else 1)
    scales[0, 0] = 0.0
    scheme = QuantScheme(element, group, True, "int8" if element == "int8" else "fp8")
    return PackedWeight(codes.to(torch.int8), scales, None, scheme)


def prepare(matrix: PackedWeight, dtype: torch.dtype = torch.float32) -> TritonRoundedWeight:
    prepared = TritonBackend(DEVICE, dtype).prepare(matrix, dtype)
    assert isinstance(prepared, TritonRoundedWeight), prepared
    return prepared


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(("n", "k", "group"), [(9, 48, 48), (33, 576, 576), (70, 256, 128), (16, 1024, 1024)])
@pytest.mark.parametrize("rows", [0, 1, 3, 17])
def test_product(rows: int, n: int, k: int, group: int, element: Literal["int8", "fp8_e4m3"], dtype: torch.dtype) -> None:
    matrix, x, bias = packed(n, k, element, group), randn(rows, k + 8, dtype=dtype, seed=1)[:, :k], randn(n, dtype=dtype, seed=2)
    weight = prepare(matrix, dtype)
    codes, scales = weight.quantize_rows(x)
    rounded = (codes.float().view(rows, k // group, group) * scales[:, :, None]).view(rows, k).double().cpu()
    step = scales.repeat_interleave(group, 1).double().cpu() * (1.0 if element == "int8" else 32.0)  # of fp8 that above half its largest
    near = ((rounded - x.double().cpu()).abs() <= step / 2 * 1.01).double()
    # Triton's interpreter loses the carry where rounding to fp8 overflows the mantissa: a few numbers come out as half.
    assert rows == 0 or float(near.mean()) >= (1.0 if element == "int8" or DEVICE.type == "cuda" else 0.9)
    exact = matrix.dequantize(torch.float64)
    close(weight.linear(x, bias), rounded @ exact.T + bias.double().cpu(), {torch.float32: 2e-5}.get(dtype, 2e-2))


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(("rows", "k", "group"), [(40, 1024, 1024), (65, 128, 128), (20, 1024, 128), (130, 160, 160)])
def test_tiles_and_splits(rows: int, k: int, group: int, element: Literal["int8", "fp8_e4m3"]) -> None:
    matrix, x = packed(66, k, element, group), randn(rows, k)
    weight = prepare(matrix)
    codes, scales = weight.quantize_rows(x)
    rounded = (codes.float().view(rows, k // group, group) * scales[:, :, None]).view(rows, k).double().cpu()
    close(weight.linear(x, None), rounded @ matrix.dequantize(torch.float64).T, 1e-4)


@pytest.mark.parametrize("element", ELEMENTS)
def test_rows_of_zeros_of_one_and_of_huge_values(element: Literal["int8", "fp8_e4m3"]) -> None:
    weight, x = prepare(packed(8, 256, element, 128)), torch.zeros(3, 256, device=DEVICE)
    x[1, 130], x[2] = -3.0, 1e30 * randn(256)
    codes, scales = weight.quantize_rows(x)
    assert not codes[0].float().any() and not weight.linear(x[:1], None).any()
    assert not scales[1, 0] and float(codes[1, 130].float() * scales[1, 1]) == -3.0
    assert weight.linear(x, None).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize(("rows", "k", "group"), [(3, 48, 48), (2, 384, 128), (0, 128, 128), (1, 128, 128)])
def test_the_op_before_rounds_as_it_would(rows: int, k: int, group: int, element: Literal["int8", "fp8_e4m3"], dtype: torch.dtype) -> None:
    weight, bias = prepare(packed(24, k, element, group), dtype), randn(24, dtype=dtype, seed=2)
    x, residual, norm = (randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(((rows, k), (rows, k), (k,))))
    x[:1, : min(group, 40)] = residual[:1, : min(group, 40)] = 0.0
    normed, total = rms_norm(x, norm, 1e-5, residual)
    rounded, stream = weight.rms_norm(x, norm, 1e-5, residual)
    assert torch.equal(stream, total)
    gated = torch.cat((x, residual), dim=1)
    for plain, fused in ((normed, rounded), (act_mul(gated, "silu"), weight.act_mul(gated, "silu"))):
        assert isinstance(fused, RoundedRows) and fused.shape == plain.shape
        codes, scales = weight.quantize_rows(plain)
        assert torch.equal(fused.codes.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(fused.scales, scales)
        assert torch.equal(weight.linear_rounded(fused, bias), weight.linear(plain, bias))


@torch.inference_mode()
def test_a_model_rounds_where_rows_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer's four products only the one after attention meets rows that have yet to be rounded; nothing else changes."""
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=96, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    model = create_model(config, Ops([TritonBackend(DEVICE, torch.float32)], torch.float32), 128, DEVICE)
    generator = torch.Generator().manual_seed(1)
    load_weights(
        model,
        (
            (name, packed(*shape, "int8", shape[1]) if "proj" in name else torch.randn(shape, generator=generator) * 0.2)
            for name, shape in config.tensor_shapes()
        ),
    )
    batch, rounded = moved(make_batch([(3, 3), (1, 5)], 16, 8)), []
    quantize = TritonRoundedWeight.quantize_rows
    monkeypatch.setattr(TritonRoundedWeight, "quantize_rows", lambda self, x: rounded.append(x.shape) or quantize(self, x))
    outputs = []
    for products in (1, 4):
        cache = KVCache(config, 8, 16, torch.float32, DEVICE)
        for layer in cache.layers:
            layer.k.fill_(0.5)
            layer.v.fill_(-0.5)
        outputs.append(model(batch, cache))
        assert len(rounded) == products * config.num_layers
        rounded.clear()
        monkeypatch.setattr(Linear, "reader", None)
    assert torch.equal(*outputs)


def test_a_row_does_not_see_its_neighbours() -> None:
    weight, x = prepare(packed(24, 512, "int8", 512)), randn(2, 512, seed=1)
    out = weight.linear(torch.cat((x, x[:1])), None)
    assert torch.equal(out[0], out[2])


@pytest.mark.parametrize("element", ELEMENTS)
def test_embedding(element: Literal["int8", "fp8_e4m3"]) -> None:
    matrix, ids = packed(40, 256, element, 128), torch.tensor([3, 39, 0], device=DEVICE)
    assert torch.equal(prepare(matrix).embedding(ids).cpu(), matrix.dequantize()[ids.cpu()])


CDNA3 = Target(4, "hip:gfx942")


def every_code(group: int) -> PackedWeight:
    """All of e4m3's numbers, both zeros among them, up to 448; and no NaN."""
    codes = torch.arange(256).to(torch.uint8).view(torch.int8).repeat(16, 1)
    codes[codes & 127 == 127] = 126
    matrix = packed(16, 256, "fp8_e4m3", group)
    return dataclasses.replace(matrix, codes=codes, scheme=dataclasses.replace(matrix.scheme, activation="fp8"))


@pytest.mark.parametrize("group", [128, 256])
def test_cdna3s_floats_have_another_bias(group: int) -> None:
    """By torch's own type: the same bits are half as much there, so 448 is 224, below its largest, 240; and what is -0 elsewhere is no
    number."""
    matrix = every_code(group)
    weight = TritonRoundedWeight(matrix, torch.float32, torch.device("cpu"), CDNA3, Tuning({}))
    assert weight.codes.dtype == torch.float8_e4m3fnuz and (matrix.codes == -128).any()
    own = weight.codes.float()
    assert own.isfinite().all() and float(own.abs().max()) == 224
    numbers = own.view(16, 256 // group, group) * weight.scales.t()[:, :, None]
    assert torch.equal(numbers.view(16, 256), matrix.dequantize())


def test_cdna3_unpacks_its_own_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows stay in 16 bits: what its conversion, torch's own type here, makes of the packed codes, times the scales."""
    monkeypatch.setattr(Target, "converts_fnuz", True)
    matrix = every_code(128)
    weight = TritonCodesWeight(matrix, torch.float32, torch.device("cpu"), CDNA3, Tuning({}))
    assert weight.kind == E4M3_FNUZ
    own = unpack(weight.codes, weight.parts, weight.run, 256).view(torch.float8_e4m3fnuz).float()
    assert torch.equal((own.view(16, 2, 128) * weight.scales.float().t()[:, :, None]).view(16, 256), matrix.dequantize())


def test_rows_are_rounded_to_cdna3s_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """240, by each kernel that rounds rows: torch makes 256 a NaN there, so it is the scale that has to take care of larger values."""
    launched: list[dict[str, object]] = []

    class Caught:
        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *tensors, **meta: launched.append(meta)

    for module, kernel in ((linear_w8a8, "quantize_rows_kernel"), (rms_norm_file, "rms_norm_kernel"), (act_mul_file, "silu_mul_kernel")):
        monkeypatch.setattr(module, kernel, Caught())
    weight = TritonRoundedWeight(every_code(128), torch.float32, torch.device("cpu"), CDNA3, Tuning({}))
    x = torch.randn(3, 256)
    weight.quantize_rows(x)
    weight.rms_norm(x, x[0], 1e-5, None)
    weight.act_mul(torch.cat((x, x), dim=1), "silu")
    assert [(meta["LARGEST"], meta["INTEGER"], meta["GROUP"]) for meta in launched] == [(240.0, False, 128)] * 3
    at_the_edge = torch.tensor([240.0, 256.0]).to(torch.float8_e4m3fnuz).float()
    assert at_the_edge[0] == 240 and at_the_edge[1].isnan()


def test_which_matrices_meet_rounded_rows() -> None:
    calibrated, plain = packed(8, 256, "int8", 256), packed(8, 256, "int8", 256)
    plain = dataclasses.replace(plain, scheme=dataclasses.replace(plain.scheme, activation="none"))
    grouped = packed(8, 256, "int8", 64)
    chosen = {
        activations: [
            type(TritonBackend(DEVICE, torch.float32, activations=activations).prepare(matrix, torch.float32))
            for matrix in (calibrated, plain, grouped)
        ]
        for activations in SETTINGS
    }
    assert chosen["auto"] == [TritonRoundedWeight, TritonCodesWeight, TritonCodesWeight]
    assert chosen["int8"] == [TritonRoundedWeight, TritonRoundedWeight, TritonCodesWeight]
    assert chosen["none"] == [TritonCodesWeight] * 3
    floats = packed(8, 256, "fp8_e4m3", 256)
    for architecture, has in (("cuda:80", False), ("cuda:90", True), ("hip:gfx90a", False), ("hip:gfx942", True)):
        reason = TritonRoundedWeight.reason_against(floats, Target(1, architecture))
        assert (reason is None) == has
