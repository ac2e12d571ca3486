"""The scale, and for asymmetric schemes the zero point, of each group: those with the smallest squared error among a few.

The obvious scale makes the largest weight representable. A smaller one clips it and is finer for all others, which at 4 bits
and below costs less than it gains. So the range is shrunk in steps and the best is kept, group by group. `importance` weighs
errors by what they do to the layer's output: the mean square of each input, or for each group the mean products of its
inputs, with which errors that cancel count less (AWQ's search for clipping is this). Scales are rounded to the type
that files keep them in before anything is measured, so the codes are right for the scale that will be used.

Where nothing is known of the inputs, each error counts with the square of its weight. The plain squared error would clip more than is
good: rounding errs to both sides and mostly cancels in a sum, but a clipped weight is always too small, layer after layer. For
SmolLM2 in nf4 (six windows of WikiText-2) the plain search lowered the weights' error by 8% and raised perplexity from 32.6 to 36.5;
this one gives 33.1 and the lowest divergence of the three.

Symmetric integers reach further down than up: -8 to 7. The scale gets the sign that puts the outermost weight on the far end
(llama.cpp's Q4_0 does the same), an eighth of the step for nothing. At 8 bits there is nothing to gain, and scales stay positive.

    float   float16 (float32 under fp8, where a scale per tensor or channel costs nothing)
    e8m0    powers of two; the formats' own rule (OCP MX 1.0, 6.3) never rounds up, the search tries the next one as well
    e4m3    E4M3 times one power of two for the matrix, so that what a file stores can be told from the product

Fp8 under float scales isn't searched: a float's relative precision doesn't depend on its scale.
"""

from __future__ import annotations

import math

import torch

from minfer.errors import ConfigError
from minfer.quant.algorithms.grid import Grid, grid_of
from minfer.quant.elements import FP8_TYPES
from minfer.quant.packed import QuantScheme

CHUNK = 2**20  # weights searched at once: small enough to stay in cache
E4M3_MAX = 448.0
# How far the range is shrunk at most, by bits: the fewer the levels, the more clipping pays.
_LOWEST_SHRINK = {8: 0.85, 6: 0.8, 4: 0.55, 3: 0.45, 2: 0.3}
STEPS = 20


class ScaleSearch:
    """Finds scales and zeros for one matrix. `matrix_max` is its largest magnitude, which the e4m3 kind needs for its common factor."""

    def __init__(self, scheme: QuantScheme, matrix_max: float = 1.0, *, search: bool = True) -> None:
        if scheme.scale_type != "float" and not scheme.symmetric:
            raise ConfigError(f"scales of the kind {scheme.scale_type} have no zero points; quantise symmetrically")
        self.scheme = scheme
        self.grid = grid_of(scheme.element, scheme.symmetric)
        # The MX rule aligns the largest weight's power of two with the largest value's, so that its scale is a power of two as well.
        self._top = 2.0 ** math.floor(math.log2(self.grid.high)) if scheme.scale_type == "e8m0" else self.grid.high
        self._signed = self.grid.is_integer and scheme.symmetric and scheme.scale_type == "float" and scheme.element != "int8"
        if self._signed:
            self._top = -self.grid.low
        self._common = common_factor(matrix_max / self.grid.high)
        self._shrinks = _shrinks(scheme, self.grid) if search else [1.0]

    def find(self, groups: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """groups float32 [N, G, g] -> scales and (asymmetric) zeros, float32 [N, G]. importance: [G, g] or [G, g, g] or None."""
        rows = max(1, CHUNK // (groups.shape[1] * groups.shape[2]))
        parts = [self._find(groups[begin : begin + rows], importance) for begin in range(0, groups.shape[0], rows)]
        scales = torch.cat([scale for scale, _ in parts])
        return scales, None if self.scheme.symmetric else torch.cat([zero for _, zero in parts if zero is not None])

    def _find(self, groups: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        low, high = groups.amin(-1), groups.amax(-1)
        best: torch.Tensor | None = None
        scales = zeros = torch.empty(0)
        for shrink in self._shrinks:
            scale, zero = self._candidate(low, high, shrink)
            if len(self._shrinks) == 1:
                return scale, zero
            error = self._error(groups, scale, zero, importance)
            if best is None:
                best, scales, zeros = error, scale, scale if zero is None else zero
                continue
            better = error < best
            best = torch.where(better, error, best)
            scales = torch.where(better, scale, scales)
            zeros = zeros if zero is None else torch.where(better, zero, zeros)
        return scales, None if self.scheme.symmetric else zeros

    def _candidate(self, low: torch.Tensor, high: torch.Tensor, shrink: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.scheme.symmetric:
            scale = self._round(torch.maximum(-low, high) * (shrink / self._top))
            return torch.where(high > -low, -scale, scale) if self._signed else scale, None
        low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
        scale = self._round((high - low) / (self.grid.high - self.grid.low))
        # Never the lowest code: GPTQ's first file version stores zero - 1, and what -1 becomes there depends on the reader.
        return scale, (self.grid.low - low / scale).round_().clamp_(self.grid.low + 1, self.grid.high)

    def _round(self, scale: torch.Tensor) -> torch.Tensor:
        """To the type the file keeps. A group of zeros gets the scale 1, one too small for the type the smallest there is."""
        kind, empty = self.scheme.scale_type, scale == 0
        if kind == "e8m0":
            rounded = torch.exp2(scale.clamp(min=2.0**-126).log2().floor())
        elif kind == "e4m3":
            rounded = (scale * self._common).clamp(2.0**-9, E4M3_MAX).to(torch.float8_e4m3fn).float() / self._common
        elif self.scheme.element in FP8_TYPES:
            rounded = scale.clamp(min=torch.finfo(torch.float32).tiny)
        else:
            rounded = scale.clamp(2.0**-24, 65504.0).half().float()
        one = 1.0 if kind != "e4m3" else 1.0 / self._common
        return rounded.masked_fill_(empty, one)

    def _error(self, groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, importance: torch.Tensor | None) -> torch.Tensor:
        """The squared error of each group, [N, G]."""
        x = groups / scale[..., None]
        rounded = self.grid.nearest(x if zero is None else x + zero[..., None])
        if zero is not None:
            rounded -= zero[..., None]
        error = rounded.sub_(x)
        if importance is None:
            error.mul_(groups).square_()
        elif importance.dim() == 2:
            error.square_().mul_(importance)
        else:  # e H e^T, one product a group
            error *= torch.matmul(error.transpose(0, 1), importance).transpose(0, 1)
        return error.sum(-1).mul_(scale.square())


def common_factor(largest_scale: float) -> float:
    """The power of two that brings the largest scale of a matrix into E4M3's upper octave, 224 < scale * factor <= 448."""
    if largest_scale <= 0 or not math.isfinite(largest_scale):
        return 1.0
    return 2.0 ** math.floor(math.log2(E4M3_MAX / largest_scale))


def _shrinks(scheme: QuantScheme, grid: Grid) -> list[float]:
    """Candidates for the share of the range that stays representable, 1 first."""
    if scheme.scale_type == "e8m0":  # the rule, and the next power, which clips nothing
        return [1.0, 2.0]
    if scheme.element in FP8_TYPES:
        return [1.0]
    bits = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}.get(scheme.element, 6 if scheme.element.startswith("fp6") else 4)
    lowest = _LOWEST_SHRINK[bits]
    return [1.0 - n * (1.0 - lowest) / STEPS for n in range(STEPS + 1)]
