"""torchao checkpoints in safetensors: each quantised tensor is flattened into `_weight_qdata`, `_weight_scale`, `_weight_zero_point`.

    Float8Tensor               qdata e4m3 [N, K], scale float: one, one a row, or blocks
    Int8Tensor                 qdata int8 [N, K], scale [N, 1] or [N, G], zero points int8
    IntxUnpackedToInt8Tensor   the same with codes of fewer bits, a byte each

    weight = scale * (qdata - zero_point)

Left out: layouts made for one GPU's kernels (Int4Tensor, tile-packed, preshuffled), and pickled `.bin` files.
"""

from __future__ import annotations

from functools import partial

import torch

from minfer.quant.groups import integers
from minfer.quant.packed import PackedWeight
from minfer.quant.readers.base import FLOATS, Headers, MatrixReader, Settings, StoredMatrix, Tensors, expect, mapping, refuse
from minfer.quant.readers.floats import fp8_matrix, is_fp8

QDATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"


class TorchAOReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        default = mapping(mapping(settings, "quant_type"), "default")
        self.label = f"torchao, {default.get('_type', 'unknown')}"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if QDATA not in headers:
            return None
        if is_fp8(headers, QDATA):
            return fp8_matrix(shape, headers, weight=QDATA, scale=SCALE)
        if headers[QDATA].dtype != "I8" or tuple(headers[QDATA].shape) != shape:
            refuse(
                f"torchao's layout {list(headers[QDATA].shape)} of {headers[QDATA].dtype}",
                "use Float8, Int8 or Intx weights, which store a byte for each weight",
            )
        n, k = shape
        groups = headers[SCALE].shape[-1] if SCALE in headers and headers[SCALE].shape else 0
        groups = groups if 0 < groups <= k and k % groups == 0 else 1
        expect(headers, SCALE, (n, groups), FLOATS)
        names: tuple[str, ...] = (QDATA, SCALE)
        if ZERO in headers:
            expect(headers, ZERO, (n, groups), ("I8", "I32", "I64"))
            names += (ZERO,)
        return StoredMatrix(names, partial(_unpack, k // groups))


def _unpack(size: int, tensors: Tensors) -> PackedWeight:
    codes = tensors[QDATA].contiguous().view(torch.uint8) + 128
    zeros = tensors[ZERO].int() + 128 if ZERO in tensors else None
    return integers(codes, 8, tensors[SCALE], zeros, (1, size))
