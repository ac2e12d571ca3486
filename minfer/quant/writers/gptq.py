"""GPTQ checkpoints, version 1 (see readers/gptq.py for the layout): what most engines load, and the only one for 3 bits and act-order.

Version 1 stores zero - 1. Zeros are never 0 here (algorithms/scales.py), so nothing borrows, and every reader agrees.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from minfer.quant.bits import pack_continuous
from minfer.quant.packed import PackedWeight
from minfer.quant.writers.base import MatrixWriter, unsigned


class GPTQWriter(MatrixWriter):
    format = "gptq"

    def refusal(self) -> str:
        if not self.layout.scheme.element.startswith("int"):
            return "it holds integers; use compressed-tensors or bitsandbytes"
        return "its layers take inputs as they are; use compressed-tensors" if self.layout.scheme.activation != "none" else ""

    def settings(self, plain: Sequence[str] = ()) -> dict[str, Any]:
        return {
            "quant_method": "gptq",
            "bits": self.layout.bits,
            "group_size": self.layout.scheme.group_size or -1,
            "desc_act": self.layout.act_order,
            "static_groups": self.layout.static_order,
            "sym": self.layout.scheme.symmetric,
            "lm_head": False,
            "true_sequential": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            **({"dynamic": {f"-:{re.escape(name)}$": {} for name in plain}} if plain else {}),
        }

    @property
    def multiple(self) -> int:
        return 32 if self.layout.bits == 3 else 32 // self.layout.bits

    def tensors(self, packed: PackedWeight, input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        codes, zeros = unsigned(packed)
        k, size = packed.shape[1], packed.scheme.group_size
        groups = torch.arange(k, dtype=torch.int32) // size
        if packed.input_order is not None:
            inverse = torch.argsort(packed.input_order)
            codes, groups = codes[:, inverse], groups[inverse]
        return {
            "qweight": pack_continuous(codes, self.layout.bits).T.contiguous(),
            "qzeros": pack_continuous((zeros - 1).T.contiguous(), self.layout.bits),
            "scales": packed.scales.T.to(torch.float16).contiguous(),
            "g_idx": groups,
        }
