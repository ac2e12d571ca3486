"""GPTQ, AWQ and SmoothQuant on small matrices, against float64 transcriptions of the papers and what the papers claim."""

from __future__ import annotations

import pytest
import torch

from minfer.errors import ConfigError
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.algorithms import awq_scales, gptq, round_to_nearest, smoothquant_scales
from minfer.quant.algorithms.gptq import inverse_factor

N, K = 24, 64


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.fixture(scope="module")
def inputs() -> torch.Tensor:
    """Correlated, and some inputs much larger than others, as a language model's are."""
    rng = torch.Generator().manual_seed(1)
    mixed = torch.randn(2000, K // 4, generator=rng) @ torch.randn(K // 4, K, generator=rng) + torch.randn(2000, K, generator=rng)
    return mixed * torch.exp(torch.randn(K, generator=rng))


def output_error(packed: PackedWeight, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs @ (packed.dequantize() - weight).T).norm() / (inputs @ weight.T).norm())


def optimal_brain_quantization(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Frantar 2022, equations 2 and 3 in float64: round a column, spread its error over those left, eliminate it from H^-1."""
    w, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    codes = torch.zeros_like(w)
    for i in range(w.shape[1]):
        codes[:, i] = (w[:, i] / scale.double()).round().clamp(low, high)
        error = (w[:, i] - codes[:, i] * scale.double()) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse -= inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    return codes


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_the_papers_greedy_update(bits: int, weight: torch.Tensor, inputs: torch.Tensor) -> None:
    hessian = inputs.T @ inputs
    packed = gptq(weight, hessian, QuantScheme(f"int{bits}", K, True), damping=0.01, order="none")  # type: ignore[arg-type]
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)
    expected = optimal_brain_quantization(weight, damped, packed.scales[:, 0], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    # A number that lies between two codes may go either way in float32, and takes its row's later columns with it.
    assert (packed.codes.double() == expected).double().mean() > 0.97
    assert (packed.codes.double() - expected).abs().max() <= 1


def test_the_factor_inverts_the_damped_hessian(inputs: torch.Tensor) -> None:
    hessian = inputs.T @ inputs
    factor = inverse_factor(hessian, 0.01).double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(K, dtype=torch.float64), atol=1e-2)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("order", ["none", "static", "group"])
@pytest.mark.parametrize(
    "scheme",
    [
        QuantScheme("int4", 32, True),
        QuantScheme("int3", 16, False),
        QuantScheme("int2", K, False),
        QuantScheme("int8", K, False),
        QuantScheme("nf4", 32, True),
        QuantScheme("fp4_e2m1", 32, True, scale_type="e8m0"),
    ],
    ids=lambda s: s.name,
)
def test_gptq_beats_rounding_on_correlated_inputs(scheme: QuantScheme, order: str, weight: torch.Tensor, inputs: torch.Tensor) -> None:
    packed = gptq(weight, inputs.T @ inputs, scheme, order=order)  # type: ignore[arg-type]
    plain = output_error(round_to_nearest(weight, scheme), weight, inputs)
    assert output_error(packed, weight, inputs) < 0.85 * plain


def test_gptq_gives_inputs_that_are_always_zero_no_say(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    dead = inputs.clone()
    dead[:, 5] = 0
    packed = gptq(weight, dead.T @ dead, QuantScheme("int4", 32, True))
    assert not packed.codes[:, 5].any()
    assert output_error(packed, weight, dead) < 0.2


def test_gptq_needs_finite_and_different_inputs(weight: torch.Tensor) -> None:
    scheme = QuantScheme("int4", 32, True)
    with pytest.raises(ConfigError, match="not finite"):
        gptq(weight, torch.full((K, K), float("nan")), scheme)
    alike = torch.ones(10, K)
    gptq(weight, alike.T @ alike, scheme)  # damping makes the best of it


def test_awq_protects_large_inputs(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    scheme = QuantScheme("int3", 32, False)
    scales = awq_scales(weight, inputs[:512], inputs.abs().mean(0), scheme)
    assert scales.shape == (K,) and (scales > 0).all()
    plain = round_to_nearest(weight, scheme, search=False)
    scaled = round_to_nearest(weight * scales, scheme, search=False).dequantize() / scales
    error = float((inputs @ (scaled - weight).T).norm() / (inputs @ weight.T).norm())
    assert error < 0.8 * output_error(plain, weight, inputs)


def test_awq_scales_of_grouped_heads_are_shared(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    scales = awq_scales(weight, inputs[:512], inputs.abs().mean(0), QuantScheme("int3", 32, False), share=2, repeat=8).view(-1, 2, 8)
    assert torch.equal(scales[:, 0], scales[:, 1])
    assert scales.unique().numel() > 1


def test_clipping_with_the_products_of_inputs_lowers_the_output_error(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    scheme = QuantScheme("int2", 16, False)
    products = torch.stack([inputs[:, g : g + 16].T @ inputs[:, g : g + 16] for g in range(0, K, 16)])
    clipped = output_error(round_to_nearest(weight, scheme, importance=products), weight, inputs)
    assert clipped < output_error(round_to_nearest(weight, scheme), weight, inputs)


def test_smoothquant_makes_8_bit_inputs_possible(weight: torch.Tensor) -> None:
    """Outlier channels 50 times the rest: rounding inputs token by token to int8 loses them, smoothing wins most of it back."""
    x = torch.randn(500, K, generator=torch.Generator().manual_seed(2))
    x[:, ::16] *= 50
    scales = smoothquant_scales(weight, x.abs().amax(0), 0.5)

    def error(w: torch.Tensor, inputs: torch.Tensor) -> float:
        rounded = round_to_nearest(w, QuantScheme("int8", K, True)).dequantize()
        step = inputs.abs().amax(1, keepdim=True) / 127
        return float((((inputs / step).round() * step) @ rounded.T - x @ weight.T).norm())

    assert error(weight * scales, x / scales) < error(weight, x) / 2
