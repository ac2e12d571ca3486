"""The numbers that a code of a scheme can stand for, in units of the scale, and rounding to the nearest of them.

Every scheme is weight = scale * (value - zero), so all algorithms divide by the scale, add the zero, and ask this file for the
nearest value. Integers round half to even, as torch does. Values beyond the ends go to the ends.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from minfer.errors import ConfigError
from minfer.quant.elements import ELEMENT_BITS, FP8_TYPES, TABLES, Element

# The 16 quantiles of NF4, as bitsandbytes writes them into every file (Dettmers 2023, appendix E).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Grid:
    """`low` and `high` are the ends. `levels` are the sorted values of a table and `codes` what stands for each; else both None."""

    element: Element
    low: float
    high: float
    levels: torch.Tensor | None = None
    codes: torch.Tensor | None = None

    @property
    def is_integer(self) -> bool:
        return self.element.startswith("int")

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """float32 of any shape -> the nearest values, float32."""
        if self.levels is not None:
            return self.levels[self._index(x)]
        if self.is_integer:
            return x.round().clamp_(self.low, self.high)
        return x.clamp(self.low, self.high).to(FP8_TYPES[self.element]).float()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """float32 of any shape -> the codes of the nearest values, int8 as `PackedWeight` wants them."""
        if self.levels is not None:
            assert self.codes is not None, "a table brings both"
            return self.codes[self._index(x)]
        if self.is_integer:
            return x.round().clamp_(self.low, self.high).to(torch.int8)
        return x.clamp(self.low, self.high).to(FP8_TYPES[self.element]).view(torch.int8)

    def _index(self, x: torch.Tensor) -> torch.Tensor:
        assert self.levels is not None, "only tables are searched"
        return torch.bucketize(x, (self.levels[1:] + self.levels[:-1]) / 2)


@functools.cache
def grid_of(element: Element, symmetric: bool) -> Grid:
    """Raises ConfigError for what only a file can define, or what has no zero point."""
    if element.startswith("int"):
        half = 2 ** (ELEMENT_BITS[element] - 1)
        return Grid(element, -half, half - 1) if symmetric or element == "int8" else Grid(element, 0, 2 * half - 1)
    if not symmetric:
        raise ConfigError(f"{element} has no zero point; quantise with it symmetrically")
    if element in FP8_TYPES:
        limit = torch.finfo(FP8_TYPES[element]).max
        return Grid(element, -limit, limit)
    if element == "table4":
        raise ConfigError("table4 stands for the values that some file lists, so nothing can be quantised to it; use nf4 or fp4_e2m1")
    table = torch.tensor(NF4_LEVELS if element == "nf4" else TABLES[element])
    levels, codes = table.sort(stable=True)
    keep = torch.cat((torch.tensor([True]), levels[1:] != levels[:-1]))  # one zero, though the formats have two
    levels, codes = levels[keep].clone(), codes[keep]
    codes[levels == 0] = int((table == 0).nonzero()[0])  # the positive one
    return Grid(element, float(levels[0]), float(levels[-1]), levels, codes.to(torch.int8))
