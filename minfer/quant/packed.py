"""`PackedWeight`: the one quantised matrix that every file format is read into and every kernel starts from.

Formats (GGUF, AWQ, GPTQ, ...) are readers that make one; algorithms (round-to-nearest, GPTQ, ...) are writers that make
one; a backend repacks it once, at load, into the layout its kernels like. So M formats and N devices cost M + N pieces.

The matrix is `weight[N, K]` (N outputs, K inputs). Every run of `group_size` inputs of one output shares a scale:

    weight[n, k] = scales[n, g] * codes[n, k] + mins[n, g],   g = k // group_size

`mins` is absent for symmetric schemes, whose codes are signed. An integer zero point z is mins = -scale * z; GGUF's Q4_1
stores the minimum itself. Both are this formula, so kernels know one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from minfer.errors import ModelLoadError

Element = Literal["int4", "int8"]
ELEMENT_BITS: dict[str, int] = {"int4": 4, "int8": 8}


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a matrix was quantised. `activation` is how its input is treated at run time: kept as it is, or int8 on the fly."""

    element: Element
    group_size: int
    symmetric: bool
    activation: Literal["none", "int8"] = "none"


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """codes: int8 [N, K], one element a byte in transit (symmetric int4: -8..7, otherwise 0..15; int8: -128..127 / as
    scheme). Backends pack them densely. scales, mins: float32 [N, K / group_size].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    mins: torch.Tensor | None
    scheme: QuantScheme

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        if k % self.scheme.group_size:
            raise ModelLoadError(f"a quantised matrix of {k} inputs can't have groups of {self.scheme.group_size}")
        groups = (n, k // self.scheme.group_size)
        for name, tensor in (("scales", self.scales), ("mins", self.mins)):
            if tensor is not None and tuple(tensor.shape) != groups:
                raise ModelLoadError(f"{name} of a quantised matrix must be {list(groups)}, not {list(tensor.shape)}")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix the codes stand for, [N, K]; the arithmetic is float32."""
        n, k = self.shape
        grouped = self.codes.view(n, -1, self.scheme.group_size).float() * self.scales[:, :, None]
        if self.mins is not None:
            grouped += self.mins[:, :, None]
        return grouped.view(n, k).to(dtype)

    def rows(self, index: torch.Tensor | slice) -> PackedWeight:
        """The same scheme over some of the outputs, in the given order (GGUF's q and k need their rows reordered)."""
        return PackedWeight(self.codes[index], self.scales[index], None if self.mins is None else self.mins[index], self.scheme)

    @staticmethod
    def concatenate(parts: list[PackedWeight]) -> PackedWeight:
        """Stacks outputs of matrices with one scheme: q, k, v or gate, up become one product."""
        first = parts[0]
        if any(part.scheme != first.scheme for part in parts):
            raise ModelLoadError(f"can't fuse matrices quantised differently: {[part.scheme for part in parts]}")
        mins = None if first.mins is None else torch.cat([part.mins for part in parts if part.mins is not None])
        return PackedWeight(torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), mins, first.scheme)
