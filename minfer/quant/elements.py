"""What a code stands for: the number formats a quantised matrix may be made of, and their decoding to float32.

    int2 int3 int4 int8   the code is the number (see `PackedWeight` for the range)
    fp8_e4m3 fp8_e5m2     8-bit floats: the code is the bit pattern (OCP OFP8; e4m3 has NaN at S.1111.111 and no infinities)
    fp6_e2m3 fp6_e3m2     6-bit floats of the MX formats, sign in bit 5 (OCP Microscaling Formats 1.0), no NaN, no infinities
    fp4_e2m1              0 0.5 1 1.5 2 3 4 6 and their negatives, sign in bit 3 (same document)
    nf4                   16 quantiles of the normal distribution (Dettmers 2023), as the file lists them
    table4                any other 16 values that the file lists (bitsandbytes' fp4)

The MX and NV formats are these elements under scales of a special kind: mxfp8 is fp8_e4m3 with one power of two (E8M0) for 32
values, mxint8 is int8 with the same, nvfp4 is fp4_e2m1 with one E4M3 scale for 16. See `QuantScheme.name`.
"""

from __future__ import annotations

from typing import Literal

import torch

Element = Literal[
    "int2", "int3", "int4", "int8", "fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1", "nf4", "table4"
]  # fmt: skip
ELEMENT_BITS: dict[str, int] = {
    "int2": 2,
    "int3": 3,
    "int4": 4,
    "int8": 8,
    "fp8_e4m3": 8,
    "fp8_e5m2": 8,
    "fp6_e2m3": 6,
    "fp6_e3m2": 6,
    "fp4_e2m1": 4,
    "nf4": 4,
    "table4": 4,
}
FP8_TYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LISTED = ("nf4", "table4")  # the file brings the values


def small_float(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """All values of an IEEE-like format without NaN and infinities, by bit pattern, sign in the top bit."""
    bias = 2 ** (exponent_bits - 1) - 1
    positive = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, (code % 2**mantissa_bits) / 2**mantissa_bits
        positive.append(2.0 ** (1 - bias) * mantissa if exponent == 0 else 2.0 ** (exponent - bias) * (1 + mantissa))
    return (*positive, *(-value for value in positive))


# Values by code; -0.0 is kept, so that a decoded matrix equals the format owner's bit for bit.
TABLES: dict[str, tuple[float, ...]] = {
    "fp4_e2m1": small_float(2, 1),
    "fp6_e2m3": small_float(2, 3),
    "fp6_e3m2": small_float(3, 2),
}
# A table whose values are all multiples of 1 / unit within int8: such a matrix is also an int8 one, with scales / unit.
INTEGER_UNITS = {"fp6_e2m3": 8}


def has_nonfinite(codes: torch.Tensor, element: Element) -> bool:
    """Whether any code is a NaN or an infinity: e4m3 has one pattern for each sign, e5m2 all with the highest exponent."""
    if element not in FP8_TYPES:
        return False
    mask = 0x7F if element == "fp8_e4m3" else 0x7C
    return bool((codes & mask == mask).any())


def decode(codes: torch.Tensor, element: Element, levels: torch.Tensor | None) -> torch.Tensor:
    """codes: int8 of any shape -> float32 of the same shape; `levels` are the 16 values of an element that is LISTED."""
    if element in FP8_TYPES:
        return codes.view(FP8_TYPES[element]).float()
    if element in TABLES:
        levels = torch.tensor(TABLES[element], device=codes.device)
    if levels is not None:
        return levels[codes.int()]
    return codes.float()
