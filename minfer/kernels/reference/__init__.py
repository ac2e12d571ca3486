"""The reference backend: every op in plain torch. Slow where it must be, right everywhere, and short enough to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minfer.kernels.ops import Backend, Experts, StackedWeight, Weight
from minfer.kernels.reference.attention import attention
from minfer.kernels.reference.elementwise import act_mul, argmax, qk_norm, rms_norm, rotary, rotary_kv, write_kv
from minfer.kernels.reference.linear import DenseWeight, DequantizedWeight
from minfer.kernels.reference.lora import lora
from minfer.kernels.reference.moe import LoopedExperts
from minfer.quant import PackedWeight


class ReferenceBackend(Backend):
    """`keep_packed` multiplies by quantised matrices as they are, dequantising at every use: little memory and no speed."""

    name = "reference"

    def __init__(self, keep_packed: bool = False) -> None:
        self.keep_packed = keep_packed

    rms_norm = staticmethod(rms_norm)
    qk_norm = staticmethod(qk_norm)
    rotary = staticmethod(rotary)
    write_kv = staticmethod(write_kv)
    rotary_kv = staticmethod(rotary_kv)
    attention = staticmethod(attention)
    act_mul = staticmethod(act_mul)
    argmax = staticmethod(argmax)
    lora = staticmethod(lora)

    def prepare(self, weight: torch.Tensor | PackedWeight, dtype: torch.dtype) -> Weight | str:
        if isinstance(weight, PackedWeight):
            return DequantizedWeight(weight, dtype) if self.keep_packed else "multiplies by dense matrices only"
        if weight.dtype != dtype:
            return f"a {weight.dtype} matrix can't multiply {dtype} activations; cast it first"
        return DenseWeight(weight)

    def stack(self, parts: Sequence[Weight]) -> Weight:
        dense = [part.tensor for part in parts if isinstance(part, DenseWeight)]
        return DenseWeight(torch.cat(dense)) if len(dense) == len(parts) else StackedWeight(parts)

    def experts(self, gate_up: Sequence[Weight], down: Sequence[Weight]) -> Experts | str:
        return LoopedExperts(gate_up, down)
