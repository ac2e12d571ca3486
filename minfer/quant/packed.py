"""`PackedWeight`: the one quantised matrix that every file format is read into and every kernel starts from.

Formats (GGUF, AWQ, GPTQ, ...) are readers that make one; algorithms (round-to-nearest, GPTQ, ...) are writers that make
one; a backend repacks it once, at load, into the layout its kernels like. So M formats and N devices cost M + N pieces.

The matrix is `weight[N, K]` (N outputs, K inputs). Every run of `group_size` inputs of one output shares a scale:

    weight[n, k] = scales[n, g] * value(codes[n, k]) + mins[n, g],   g = k // group_size

`value` is the identity for integers; elements.py says what it is for floats and tables. `mins` is absent for symmetric
schemes. An integer zero point z is mins = -scale * z; GGUF's Q4_1 stores the minimum itself, HQQ a fractional zero point. All
are this formula, so kernels know one. With scales of 16-bit precision the product and the sum are exact in float32.

Coarser scales (per channel, per tensor, per block of rows and inputs) are written out for the rows and groups they cover
(groups.py): that costs a few bytes a row, and saves every kernel the other cases.

Where quantisation went through the inputs in another order ("act-order", GPTQ's desc_act), a group is not a run of inputs.
Then `input_order` puts them in order: column j of the codes belongs to input `input_order[j]`, and a product is
`x[:, input_order] @ packed.T`. A kernel that doesn't know this must decline the matrix.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from minfer.errors import ModelLoadError
from minfer.quant.elements import ELEMENT_BITS, FP8_TYPES, INTEGER_UNITS, LISTED, TABLES, Element, decode

ScaleType = Literal["float", "e8m0", "e4m3"]


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a matrix was quantised.

    activation: what the matrix was calibrated to meet: inputs as they are, or rounded to int8 or fp8 on the fly. A backend may be
    more exact than that. scale_type: what the scales were stored as: any float; powers of two (e8m0); or E4M3 floats times
    one float of the matrix (e4m3).
    """

    element: Element
    group_size: int
    symmetric: bool
    activation: Literal["none", "int8", "fp8"] = "none"
    scale_type: ScaleType = "float"

    @property
    def name(self) -> str:
        """The name in use for this combination: "mxfp4", "nvfp4", "int4 (groups of 128)"."""
        family = self.element.split("_")[0]
        if self.scale_type == "e8m0" and self.group_size == 32:
            return "mx" + family
        if self.scale_type == "e4m3" and self.group_size == 16:
            return "nv" + family
        return f"{self.element} (groups of {self.group_size})"


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """codes: int8 [N, K], one element a byte in transit; backends pack them densely. scales, mins: float32 [N, K / group_size].

    Codes of symmetric integers are signed: -2..1, -4..3, -8..7, -128..127; with minima those of int2, int3 and int4 are unsigned,
    0..3, 0..7, 0..15, and int8's are any. Other elements' codes are bit patterns (an fp8 byte as int8) or indices of a table.
    levels: float32 [16], for elements whose table comes with the file. input_order: int64 [K], see above.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None
    scheme: QuantScheme
    levels: torch.Tensor | None = None
    input_order: torch.Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        element, size = self.scheme.element, self.scheme.group_size
        if element not in ELEMENT_BITS:
            raise ModelLoadError(f"a quantised matrix can't be made of {element!r}; known are {', '.join(ELEMENT_BITS)}")
        if size < 1 or k % size:
            raise ModelLoadError(f"a quantised matrix of {k} inputs can't have groups of {size}")
        for name, tensor in (("scales", self.scales), ("mins", self.mins)):
            if tensor is not None and tuple(tensor.shape) != (n, k // size):
                raise ModelLoadError(f"{name} of a quantised matrix must be {[n, k // size]}, not {list(tensor.shape)}")
        if (self.levels is not None) != (element in LISTED) or (self.levels is not None and self.levels.shape != (16,)):
            raise ModelLoadError(f"16 levels belong to the elements {', '.join(LISTED)} and to no other, not to {element}")
        if self.input_order is not None and self.input_order.shape != (k,):
            raise ModelLoadError(f"the order of {k} inputs can't have {self.input_order.shape[0]} entries")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def table(self) -> tuple[float, ...] | None:
        """The values that codes 0, 1, ... index; None for integers and fp8."""
        return tuple(self.levels.tolist()) if self.levels is not None else TABLES.get(self.scheme.element)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix the codes stand for, [N, K]; the arithmetic is float32."""
        n, k = self.shape
        grouped = decode(self.codes, self.scheme.element, self.levels).view(n, -1, self.scheme.group_size) * self.scales[:, :, None]
        if self.mins is not None:
            grouped += self.mins[:, :, None]
        weight = grouped.view(n, k).to(dtype)
        if self.input_order is None:
            return weight
        in_place = torch.empty_like(weight)
        in_place[:, self.input_order] = weight
        return in_place

    def widened(self) -> PackedWeight:
        """The same numbers in an element that kernels have, where there is one: int2, int3 -> int4; 6-bit floats -> int8 or fp8.

        Nothing is rounded: a 3-bit code is a 4-bit code, E2M3's values are eighths of integers up to 60, and E4M3 holds all of
        E3M2's.
        """
        element, scheme = self.scheme.element, self.scheme
        if element in ("int2", "int3"):
            return dataclasses.replace(self, scheme=dataclasses.replace(scheme, element="int4"))
        if element == "fp6_e3m2":
            bits = decode(self.codes, element, None).to(FP8_TYPES["fp8_e4m3"]).view(torch.int8)
            return dataclasses.replace(self, codes=bits, scheme=dataclasses.replace(scheme, element="fp8_e4m3", scale_type="float"))
        if element not in INTEGER_UNITS:
            return self
        unit = INTEGER_UNITS[element]
        values = torch.tensor([int(value * unit) for value in TABLES[element]], dtype=torch.int8, device=self.codes.device)
        integers = dataclasses.replace(scheme, element="int8", scale_type="float")
        return dataclasses.replace(self, codes=values[self.codes.int()], scales=self.scales / unit, scheme=integers)

    def rows(self, index: torch.Tensor | slice) -> PackedWeight:
        """The same scheme over some of the outputs, in the given order (GGUF's q and k need their rows reordered)."""
        mins = None if self.mins is None else self.mins[index]
        return dataclasses.replace(self, codes=self.codes[index], scales=self.scales[index], mins=mins)

    def is_alike(self, other: PackedWeight) -> bool:
        """Whether outputs of both can stand in one matrix."""
        return self.scheme == other.scheme and _same(self.levels, other.levels) and _same(self.input_order, other.input_order)

    @staticmethod
    def concatenate(parts: list[PackedWeight]) -> PackedWeight:
        """Stacks outputs of matrices with one scheme: q, k, v or gate, up become one product."""
        first = parts[0]
        if not all(first.is_alike(part) for part in parts):
            raise ModelLoadError(f"can't fuse matrices whose schemes, levels or orders of inputs differ: {[part.scheme for part in parts]}")
        mins = None if first.mins is None else torch.cat([part.mins for part in parts if part.mins is not None])
        codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
        return dataclasses.replace(first, codes=codes, scales=scales, mins=mins)


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b)
