"""compressed-tensors checkpoints (see readers/compressed_tensors.py), the format of vLLM's own tools.

    int4, int8, int2 weights    pack-quantized, groups or rows, with or without zero points
    int8 weights and inputs     int-quantized (W8A8), one scale a row, inputs rounded token by token
    fp8                         float-quantized, one scale a row or matrix; inputs by token, or by a measured scale
    mxfp4, mxfp6, mxfp8, nvfp4  their formats of those names

3 bits are refused: the format's layout of them changed between releases under one name, and each reads only its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minfer.quant.algorithms.scales import common_factor
from minfer.quant.bits import pack_continuous, pack_nibbles
from minfer.quant.packed import PackedWeight
from minfer.quant.writers.base import MatrixWriter, unsigned

_MX_FORMATS = {"fp4_e2m1": "mxfp4-pack-quantized", "fp6_e2m3": "mxfp6-pack-quantized", "fp8_e4m3": "mxfp8-quantized"}


class CompressedTensorsWriter(MatrixWriter):
    format = "compressed-tensors"

    @property
    def kind(self) -> str:
        """The `format` inside the settings."""
        scheme = self.layout.scheme
        if scheme.scale_type == "e8m0":
            return _MX_FORMATS[scheme.element]
        if scheme.scale_type == "e4m3":
            return "nvfp4-pack-quantized"
        if scheme.element == "fp8_e4m3":
            return "float-quantized"
        return "int-quantized" if scheme.activation == "int8" else "pack-quantized"

    def refusal(self) -> str:
        scheme = self.layout.scheme
        if self.layout.act_order:
            return "current releases don't read an order of inputs; use gptq, or act-order static"
        if scheme.element == "int3":
            return "its releases lay 3 bits out differently; use gptq"
        if scheme.scale_type == "e8m0":
            return "" if scheme.element in _MX_FORMATS else "its MX formats are mxfp4, mxfp6 (e2m3) and mxfp8 (e4m3)"
        if scheme.element.startswith("int") or scheme.element == "fp8_e4m3" or scheme.scale_type == "e4m3":
            return ""
        return "it has integers, fp8 (e4m3), mxfp4, mxfp6, mxfp8 and nvfp4; use bitsandbytes for nf4"

    def settings(self, plain: Sequence[str] = ()) -> dict[str, Any]:
        group = {"targets": ["Linear"], "weights": self._weights(), "input_activations": self._inputs(), "output_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": self.kind,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", *plain],
            "kv_cache_scheme": None,
        }

    def _weights(self) -> dict[str, Any]:
        layout, scheme = self.layout, self.layout.scheme
        strategy = "tensor" if layout.per_tensor else "group" if scheme.group_size else "channel"
        if scheme.scale_type == "e4m3":
            strategy = "tensor_group"
        return {
            "num_bits": layout.bits,
            "type": "int" if scheme.element.startswith("int") else "float",
            "symmetric": scheme.symmetric,
            "strategy": strategy,
            "group_size": scheme.group_size or None,
            "dynamic": False,
            "actorder": "static" if layout.static_order else None,
            "observer": "minmax",
        }

    def _inputs(self) -> dict[str, Any] | None:
        activation = self.layout.scheme.activation
        if activation == "none":
            return None
        static = self.layout.static_inputs
        return {
            "num_bits": 8,
            "type": "int" if activation == "int8" else "float",
            "symmetric": True,
            "strategy": "tensor" if static else "token",
            "dynamic": not static,
        }

    def tensors(self, packed: PackedWeight, input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        kind = self.kind
        if kind == "pack-quantized":
            return self._integers(packed)
        if kind == "nvfp4-pack-quantized":
            return _nvfp4(packed)
        if packed.scheme.scale_type == "e8m0":
            return _microscaled(packed)
        inputs = {} if input_scale is None else {"input_scale": input_scale.float().reshape(1)}
        scales = packed.scales[:1, :1].reshape(1) if self.layout.per_tensor else packed.scales[:, :1]
        codes = packed.codes if kind == "int-quantized" else packed.codes.view(torch.float8_e4m3fn)
        return {"weight": codes.contiguous(), "weight_scale": scales.contiguous(), **inputs}

    def _integers(self, packed: PackedWeight) -> dict[str, torch.Tensor]:
        codes, zeros = unsigned(packed)
        tensors = {
            "weight_packed": pack_continuous(codes, self.layout.bits),
            "weight_scale": packed.scales.to(torch.float16),
            "weight_shape": torch.tensor(list(packed.shape)),
        }
        if packed.mins is not None:
            tensors["weight_zero_point"] = pack_continuous(zeros.T.contiguous(), self.layout.bits).T.contiguous()
        return tensors


def _microscaled(packed: PackedWeight) -> dict[str, torch.Tensor]:
    exponents = packed.scales.to(torch.float8_e8m0fnu).view(torch.uint8)
    if packed.scheme.element == "fp8_e4m3":
        return {"weight": packed.codes.view(torch.float8_e4m3fn), "weight_scale": exponents}
    codes = packed.codes.view(torch.uint8)
    bytes_ = pack_nibbles(codes) if packed.scheme.element == "fp4_e2m1" else _pack_sixes(codes)
    return {"weight_packed": bytes_, "weight_scale": exponents}


def _pack_sixes(codes: torch.Tensor) -> torch.Tensor:
    """Four 6-bit codes in three bytes: uint8 [N, K] -> uint8 [N, 3 K / 4]."""
    return pack_continuous(codes, 6).view(torch.uint8)


def _nvfp4(packed: PackedWeight) -> dict[str, torch.Tensor]:
    factor = common_factor(float(packed.scales.max()))  # a power of two, so the small scales come back exactly
    small = (packed.scales * factor).to(torch.float8_e4m3fn)
    codes = pack_nibbles(packed.codes.view(torch.uint8))
    return {"weight_packed": codes, "weight_scale": small, "weight_global_scale": torch.tensor([factor])}
