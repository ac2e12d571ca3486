"""AWQ checkpoints in AutoAWQ's GEMM layout (see readers/awq.py): 4 bits, packed along the outputs, nibbles in a GPU's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minfer.quant.bits import pack_continuous
from minfer.quant.packed import PackedWeight
from minfer.quant.writers.base import MatrixWriter, unsigned

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds column _ORDER[i] of eight


class AWQWriter(MatrixWriter):
    format = "awq"

    def refusal(self) -> str:
        if self.layout.scheme.element != "int4":
            return "it holds 4-bit integers; use gptq or compressed-tensors"
        if self.layout.act_order:
            return "it has no order of inputs; use gptq, or act-order static"
        return "its layers take inputs as they are; use compressed-tensors" if self.layout.scheme.activation != "none" else ""

    def settings(self, plain: Sequence[str] = ()) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.layout.scheme.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head", *plain],
        }

    @property
    def multiple(self) -> int:
        return 8

    def tensors(self, packed: PackedWeight, input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        codes, zeros = unsigned(packed)
        return {
            "qweight": _pack(codes.T),
            "qzeros": _pack(zeros.T),
            "scales": packed.scales.T.to(torch.float16).contiguous(),
        }


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [R, N] -> int32 [R, N / 8]."""
    return pack_continuous(codes.unflatten(-1, (-1, 8))[..., _ORDER].flatten(-2), 4)
