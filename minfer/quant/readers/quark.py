"""AMD Quark checkpoints: FP8, int8, 4-bit integers in groups, MXFP4.

    fp8_e4m3        weight e4m3 [N, K], weight_scale: one, or one a row
    int8            weight int8 [N, K], weight_scale and weight_zero_point: one, or one a row
    uint4, int4     weight int32 [K, N / 8], weight_scale [G, N], weight_zero_point int32 [G, N / 8], packed along N; with pack_method
                    "reorder" in AWQ's order of columns. int4 is two's complement, zero points included
    fp4, e8m0       weight uint8 [N, K / 2], weight_scale uint8 [N, K / 32]

Which of uint4 and int4 it is only the settings tell: by layer (`layer_quant_config`, globs) or for all (`global_quant_config`).
"""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch

from minfer.errors import ModelLoadError
from minfer.quant.bits import unpack_continuous
from minfer.quant.groups import integers
from minfer.quant.packed import PackedWeight
from minfer.quant.readers.awq import unpack_awq_order
from minfer.quant.readers.base import (
    FLOATS,
    Headers,
    MatrixReader,
    Settings,
    StoredMatrix,
    Tensors,
    expect,
    mapping,
    refuse,
    text,
    whole,
)
from minfer.quant.readers.floats import fp8_matrix, is_fp8, mx_matrix

UNUSED = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "weight_zero_point")


class QuarkReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        self._global = mapping(settings, "global_quant_config")
        self._layers = mapping(settings, "layer_quant_config")
        self._reorder = text(mapping(settings, "export"), "pack_method", "reorder") == "reorder"
        self.label = f"Quark, {text(self._weight_settings(''), 'dtype', 'unknown')}"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if "weight" not in headers or headers["weight"].dtype in FLOATS:
            return None
        kind = headers["weight"].dtype
        if is_fp8(headers):
            stored = fp8_matrix(shape, headers)
        elif kind == "U8":
            stored = mx_matrix("fp4_e2m1", shape, headers)
        elif kind == "I32":
            return self._groups(name, shape, headers)
        elif kind == "I8":
            return _bytes(shape, headers)
        else:
            refuse(f"a Quark matrix of {kind}", "known are FP8, int8, int4, uint4 and MXFP4")
        return replace(stored, unused=UNUSED)

    def _weight_settings(self, name: str) -> Settings:
        for pattern in self._layers:
            if fnmatchcase(name, pattern):
                return _first(mapping(self._layers, pattern))
        return _first(self._global)

    def _groups(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix:
        (n, k), settings = shape, self._weight_settings(name)
        dtype, size = text(settings, "dtype", "unknown"), whole(settings, "group_size")
        if dtype not in ("int4", "uint4") or text(settings, "qscheme", "per_group") != "per_group":
            refuse(f"Quark's {dtype} with qscheme {settings.get('qscheme')!r}", "known are int4 and uint4 per_group")
        if n % 8 or size > k or k % size:
            raise ModelLoadError(f"Quark with groups of {size} can't hold a matrix {[n, k]}")
        expect(headers, "weight", (k, n // 8), ("I32",), f"dtype {dtype}")
        expect(headers, "weight_scale", (k // size, n), FLOATS, f"group_size={size}")
        names: tuple[str, ...] = ("weight", "weight_scale")
        if "weight_zero_point" in headers:
            expect(headers, "weight_zero_point", (k // size, n // 8), ("I32",))
            names += ("weight_zero_point",)
        elif dtype == "uint4":
            raise ModelLoadError("its tensor 'weight_zero_point' is missing")
        return StoredMatrix(names, partial(_unpack_groups, shape, size, self._reorder, dtype == "int4"), UNUSED)


def _first(settings: Settings) -> Settings:
    """The settings of the weights; two stages (FP8 scales of FP4 weights) come as a list."""
    weight = settings.get("weight")
    if isinstance(weight, list) and weight:
        settings = {"weight": weight[0]}
    return mapping(settings, "weight")


def _unpack_groups(shape: tuple[int, int], size: int, reorder: bool, signed: bool, tensors: Tensors) -> PackedWeight:
    n = shape[0]
    unpack = unpack_awq_order if reorder else partial(unpack_continuous, bits=4)
    flip = 8 if signed else 0  # two's complement to offset binary
    codes = unpack(tensors["weight"], count=n).T.contiguous() ^ flip
    zeros = unpack(tensors["weight_zero_point"], count=n).T ^ flip if "weight_zero_point" in tensors else None
    return integers(codes, 4, tensors["weight_scale"].T, zeros, (1, size))


def _bytes(shape: tuple[int, int], headers: Headers) -> StoredMatrix:
    expect(headers, "weight", shape, ("I8",))
    found = tuple(headers["weight_scale"].shape) if "weight_scale" in headers else ()
    block = shape if found in ((), (1,)) else (1, shape[1])
    expect(headers, "weight_scale", found if found in ((), (1,), (shape[0], 1)) else (shape[0],), FLOATS)
    names: tuple[str, ...] = ("weight", "weight_scale")
    if "weight_zero_point" in headers:
        expect(headers, "weight_zero_point", found, ("I8", "I32"))
        names += ("weight_zero_point",)
    return StoredMatrix(names, partial(_unpack_bytes, block), UNUSED)


def _unpack_bytes(block: tuple[int, int], tensors: Tensors) -> PackedWeight:
    codes = tensors["weight"].contiguous().view(torch.uint8) + 128
    zeros = tensors["weight_zero_point"].int() + 128 if "weight_zero_point" in tensors else None
    return integers(codes, 8, tensors["weight_scale"], zeros, block)
