"""bitsandbytes checkpoints of NF4 (see readers/bitsandbytes.py), with plain float32 maxima: half a bit a weight, in blocks of 64.

The maxima aren't quantised a second time ("double quantisation" would save 0.37 bits a weight and round the scales again).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from minfer.quant.bits import pack_nibbles
from minfer.quant.packed import PackedWeight
from minfer.quant.writers.base import MatrixWriter


class BitsAndBytesWriter(MatrixWriter):
    format = "bitsandbytes"

    def refusal(self) -> str:
        scheme = self.layout.scheme
        return (
            "" if scheme.element == "nf4" and scheme.activation == "none" else "it is written for nf4 only; use gptq or compressed-tensors"
        )

    def settings(self, plain: Sequence[str] = ()) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ["lm_head", *plain],
        }

    @property
    def multiple(self) -> int:
        return 2  # codes in a byte

    def tensors(self, packed: PackedWeight, input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        assert packed.levels is not None, "nf4 has levels"
        state = {"quant_type": "nf4", "blocksize": packed.scheme.group_size, "dtype": "bfloat16", "shape": list(packed.shape)}
        return {
            "weight": pack_nibbles(packed.codes.view(torch.uint8).flatten(), high_first=True)[:, None].contiguous(),
            "weight.absmax": packed.scales.flatten().contiguous(),
            "weight.quant_map": packed.levels.clone(),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }
