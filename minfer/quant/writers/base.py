"""What a writer of quantised checkpoints is: the reverse of a reader (readers/base.py), one a format.

It is made for a `Layout`, says what goes into config.json as `quantization_config`, and turns each `PackedWeight` into the tensors
of that format. What a format can't hold is refused when the writer is made, or by `check` before any work is done on a matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from minfer.errors import ConfigError
from minfer.quant.elements import ELEMENT_BITS
from minfer.quant.packed import PackedWeight, QuantScheme


@dataclass(frozen=True)
class Layout:
    """What all matrices of a checkpoint share. `scheme.group_size` 0: one scale a row, whatever its length.

    act_order: groups follow the order of processing, so each input's group is written down. static_order: inputs were taken by
    importance, but groups are runs. static_inputs: the scale of a layer's inputs was measured and is written (fp8).
    per_tensor: one scale a matrix.
    """

    scheme: QuantScheme
    act_order: bool = False
    static_order: bool = False
    static_inputs: bool = False
    per_tensor: bool = False

    @property
    def bits(self) -> int:
        return ELEMENT_BITS[self.scheme.element]


class MatrixWriter(ABC):
    """`tensors` are named by the end of the name, as a reader sees them: "qweight" of "model.layers.0.mlp.up_proj.qweight"."""

    format: ClassVar[str]

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        reason = self.refusal()
        if reason:
            raise ConfigError(f"the format {self.format} can't hold {describe(layout.scheme)}: {reason}")

    @abstractmethod
    def refusal(self) -> str:
        """Why the format can't hold this layout, and what can; empty if it can."""

    @abstractmethod
    def settings(self, plain: Sequence[str] = ()) -> dict[str, Any]:
        """The `quantization_config`. plain: names of layers that stay as they are, as the head always does."""

    @abstractmethod
    def tensors(self, packed: PackedWeight, input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`input_scale`: float32, one number, where the layout has static inputs."""

    @property
    def multiple(self) -> int:
        """What has to divide a matrix's sizes, so that words hold them whole."""
        return 1

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raises ConfigError for a matrix [N, K] whose size doesn't fit the format."""
        if shape[0] % self.multiple or shape[1] % self.multiple:
            raise ConfigError(
                f"{name} is {list(shape)}; {self.format} with {self.layout.bits} bits holds sizes that {self.multiple} divides"
            )


def describe(scheme: QuantScheme) -> str:
    kind = "" if scheme.symmetric else " with zero points"
    return f"{scheme.element} in groups of {scheme.group_size}{kind}" if scheme.group_size else f"{scheme.element}{kind}"


def unsigned(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer codes uint8 [N, K] from 0, and their zero points uint8 [N, G]: weight = scale * (code - zero)."""
    bits = ELEMENT_BITS[packed.scheme.element]
    middle = 2 ** (bits - 1)
    if packed.mins is None:
        return (packed.codes.int() + middle).to(torch.uint8), torch.full(packed.scales.shape, middle, dtype=torch.uint8)
    shift = 128 if bits == 8 else 0
    zeros = (shift - packed.mins / packed.scales).round()
    return (packed.codes.int() + shift).to(torch.uint8), zeros.to(torch.uint8)
