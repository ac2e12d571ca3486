"""AQLM checkpoints (Egiazarian 2024): each run of 8 weights is a sum of vectors, one from each codebook, times a scale of its output.

    codes       int8 or int16 [N / og, K / ig, C]   stored signed: an index is the number modulo 2^bits
    codebooks   [C, 2^bits, og, ig]                 ig inputs (8) of og outputs (1)
    scales      [N / og, 1, 1, 1]

    weight[o og + a, i ig + b] = scales[o] * sum over c of codebooks[c, codes[o, i, c], a, b]

No kernel here looks vectors up, so a matrix is expanded while it is read and rounded to int8 in groups of 32: 9 bits a weight instead of
2, and an error of at most 1/254 of a group's largest weight.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from minfer.errors import ModelLoadError
from minfer.quant.packed import PackedWeight, QuantScheme
from minfer.quant.readers.base import FLOATS, Headers, MatrixReader, Settings, StoredMatrix, Tensors, expect, whole

GROUP = 32


class AQLMReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        self._inputs = whole(settings, "in_group_size", 8, high=1024)
        self._outputs = whole(settings, "out_group_size", 1, high=1024)
        self._books = whole(settings, "num_codebooks", 1, high=64)
        self._bits = whole(settings, "nbits_per_codebook", 16, high=16)
        self.label = f"AQLM, {self._books} codebooks of {self._bits} bits, read as int8"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if "codes" not in headers:
            return None
        n, k = shape
        if n % self._outputs or k % self._inputs:
            raise ModelLoadError(f"{[n, k]} can't be cut into blocks of {self._outputs} outputs and {self._inputs} inputs")
        grid = (n // self._outputs, k // self._inputs)
        expect(headers, "codes", (*grid, self._books), ("I8",) if self._bits <= 8 else ("I16",))
        expect(headers, "codebooks", (self._books, 2**self._bits, self._outputs, self._inputs), FLOATS)
        expect(headers, "scales", (grid[0], 1, 1, 1), FLOATS)
        return StoredMatrix(("codes", "codebooks", "scales"), partial(_unpack, shape))


def _unpack(shape: tuple[int, int], tensors: Tensors) -> PackedWeight:
    n, k = shape
    weight = dequantize(tensors)
    if not bool(weight.isfinite().all()):
        raise ModelLoadError("its codebooks or scales are not all finite; the file is damaged")
    size = math.gcd(GROUP, k)
    grouped = weight.view(n, k // size, size)
    scales = grouped.abs().amax(-1) / 127
    codes = (grouped / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round_().clamp_(-127, 127)
    return PackedWeight(codes.to(torch.int8).view(n, k), scales, None, QuantScheme("int8", size, True))


def dequantize(tensors: Tensors) -> torch.Tensor:
    """The matrix, float32 [N, K]."""
    codes, books, scales = tensors["codes"], tensors["codebooks"].float(), tensors["scales"].float()
    count, size, outputs, inputs = books.shape
    rows, columns, _ = codes.shape
    total = torch.zeros(rows * columns, outputs * inputs)
    for book in range(count):
        total += books[book].view(size, -1).index_select(0, codes[..., book].flatten().int() % size)
    blocks = total.view(rows, columns, outputs, inputs) * scales
    return blocks.swapaxes(1, 2).reshape(rows * outputs, columns * inputs)
