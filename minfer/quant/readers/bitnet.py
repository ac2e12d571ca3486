"""BitNet b1.58 checkpoints (Ma 2024) as transformers saves them: weights of -1, 0 and 1 under one scale, four to a byte.

`weight` is uint8 [N / 4, K]: bits 2 i and 2 i + 1 of row r hold the weight of output r + i N / 4, plus one. The scale is the matrix's
`weight_scale`. Layers of class `bitlinear` divide by it, those of class `autobitlinear` multiply. Either way the model was trained with
inputs rounded to int8, a scale a token.

Left out: `use_rms_norm` (layers that normalise their inputs), and checkpoints whose full-precision weights are rounded at every use
(`quantization_mode: online`).
"""

from __future__ import annotations

from functools import partial

import torch

from minfer.errors import ModelLoadError
from minfer.quant.packed import PackedWeight, QuantScheme
from minfer.quant.readers.base import FLOATS, Headers, MatrixReader, Settings, StoredMatrix, Tensors, expect, refuse, text

CLASSES = ("bitlinear", "autobitlinear")


class BitNetReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        self._class = text(settings, "linear_class", "bitlinear")
        if self._class not in CLASSES:
            refuse(f"BitNet's linear_class {self._class!r}", f"use a checkpoint in one of {', '.join(CLASSES)}")
        if self._class == "autobitlinear" and text(settings, "quantization_mode", "offline") != "offline":
            refuse(
                "a BitNet checkpoint that is rounded while it runs", "use one with quantization_mode offline, or a GGUF file of the model"
            )
        if settings.get("use_rms_norm"):
            refuse("a BitNet checkpoint whose layers normalise their inputs (use_rms_norm)", "use a GGUF file of the model")
        self.label = "BitNet, 1.58 bits"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if "weight" not in headers or headers["weight"].dtype in FLOATS:
            return None
        n, k = shape
        expect(headers, "weight", (-(-n // 4), k), ("U8",))
        if "weight_scale" not in headers or headers["weight_scale"].dtype not in FLOATS or headers["weight_scale"].shape not in ((), (1,)):
            raise ModelLoadError("its tensor 'weight_scale' is missing or not one float")
        return StoredMatrix(("weight", "weight_scale"), partial(_unpack, shape, self._class == "bitlinear"))


def _unpack(shape: tuple[int, int], divide: bool, tensors: Tensors) -> PackedWeight:
    n, k = shape
    packed, scale = tensors["weight"], tensors["weight_scale"].float().flatten()
    codes = torch.cat([packed >> 2 * i & 3 for i in range(4)])[:n]
    if bool((codes == 3).any()):
        raise ModelLoadError("some of its weights are none of -1, 0 and 1; the file is damaged")
    scales = (1 / scale if divide else scale).expand(n, 1).contiguous()
    return PackedWeight((codes.to(torch.int8) - 1), scales, None, QuantScheme("int2", k, True, activation="int8"))
