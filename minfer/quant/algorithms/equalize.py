"""Scales that move difficulty between a layer's inputs and its weights: AWQ (Lin 2023) and SmoothQuant (Xiao 2022).

y = W x = (W diag(s)) (diag(1/s) x) for any s > 0: the same function before rounding, but not after. Dividing the inputs costs nothing,
because it is folded into whatever makes them: the norm's weight, or the rows of the matrix before.

    AWQ          s > 1 where inputs are large: their weights take more of the grid. Searched over s = mean|x|^r, and that divided by
                 mean|w|^(1 - r), ten exponents r each, for the smallest error of the output. One number is looked for, so some inputs
                 and some outputs are enough to find it: a search over all of them takes most of the time there is.
    SmoothQuant  s_j = max|x_j|^alpha / max|w_j|^(1 - alpha): outliers of the inputs go into the weights, so both fit 8 bits.

AWQ's second step, clipping, is round_to_nearest's search for scales with the products of the inputs as importance.
"""

from __future__ import annotations

import torch

from minfer.quant.algorithms.round_to_nearest import round_to_nearest
from minfer.quant.packed import QuantScheme

STEPS = 10
OUTPUTS = 512  # that candidates are judged by, at most
SMALLEST = 1e-4


def awq_scales(
    weight: torch.Tensor, probe: torch.Tensor, mean_abs: torch.Tensor, scheme: QuantScheme, share: int = 1, repeat: int = 1
) -> torch.Tensor:
    """s float32 [K] for weight [N, K] (all matrices that see the same inputs, stacked), all ones if nothing helps.

    probe: some inputs, float32 [P, K], by which errors are measured. mean_abs: the mean magnitude of each input, [K].
    share, repeat: inputs come in K / (share * repeat) * share heads of `repeat`; each run of `share` heads gets one s (grouped
    queries share the matrix that s is folded into).
    """
    w_mean = weight.abs().mean(0)
    some = weight[torch.linspace(0, len(weight) - 1, min(OUTPUTS, len(weight))).long()]
    best = _output_error(some, torch.ones_like(mean_abs), probe, scheme)
    chosen = torch.ones_like(mean_abs)
    for step in range(1, STEPS + 1):
        ratio = step / STEPS
        power = mean_abs.clamp(min=SMALLEST).pow(ratio)
        for scales in (power, power / (w_mean.pow(1 - ratio) + SMALLEST)):
            scales = shared(scales.clamp(min=SMALLEST), share, repeat)
            scales = scales / (scales.max() * scales.min()).sqrt()
            error = _output_error(some, scales, probe, scheme)
            if error < best:
                best, chosen = error, scales
    return chosen


def smoothquant_scales(weight: torch.Tensor, max_abs: torch.Tensor, alpha: float) -> torch.Tensor:
    """s float32 [K] for weight [N, K] and the largest magnitude of each input, [K]; ones where an input or its weights are all zero."""
    w_max = weight.abs().amax(0)
    scales = max_abs.clamp(min=1e-8).pow(alpha) / w_max.clamp(min=1e-8).pow(1 - alpha)
    return torch.where((max_abs > 0) & (w_max > 0), scales.clamp(1e-5, 1e5), torch.ones_like(scales))


def shared(scales: torch.Tensor, share: int, repeat: int) -> torch.Tensor:
    """The mean over each run of `share` heads of size `repeat`, for every one of them: [K] -> [K]."""
    if share == 1:
        return scales
    heads = scales.view(-1, share, repeat)
    return heads.mean(1, keepdim=True).expand_as(heads).reshape(-1)


def _output_error(weight: torch.Tensor, scales: torch.Tensor, probe: torch.Tensor, scheme: QuantScheme) -> float:
    """The squared error of the outputs for the probe's inputs. Scales of groups aren't searched here, that is the next step."""
    rounded = round_to_nearest(weight * scales, scheme, search=False).dequantize() / scales
    return float((probe @ (rounded - weight).T).square().sum())
