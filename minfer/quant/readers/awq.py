"""AWQ checkpoints (Lin 2023): 4 bits, a zero point for each group, in the three layouts that AutoAWQ and llm-awq write.

    gemm        qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N]: packed along N, and the eight nibbles of a word
                hold columns 0 2 4 6 1 3 5 7 (the order in which a GPU's half2 conversion wants them)
    gemv        qweight int32 [N, K / 8], qzeros int32 [N, w], scales [N, 8 w]: packed along K in natural order, groups padded to w
    gemv_fast   qweight int16 [N / 4, K], scales and qzeros float16 [8 w, N]: four rows interleaved in chunks of 64 inputs, each
                32 of them shuffled; qzeros holds -scale * zero, already rounded to float16

    weight[n, k] = scales * (code - zero), and unlike GPTQ's no zero is ever stored minus one.

Left out: the marlin layout (made for one kernel), and the 8 bits that no AWQ tool writes in these layouts.
"""

from __future__ import annotations

from functools import partial

import torch

from minfer.errors import ModelLoadError
from minfer.quant.bits import unpack_continuous
from minfer.quant.groups import expand_blocks, integers
from minfer.quant.packed import PackedWeight, QuantScheme
from minfer.quant.readers.base import FLOATS, Headers, MatrixReader, Settings, StoredMatrix, Tensors, expect, refuse, text, whole

_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # column c of eight is nibble _COLUMNS[c] of the word
VERSIONS = ("gemm", "gemv", "gemv_fast")


class AWQReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        """Takes AutoAWQ's own names (w_bit, q_group_size, version) and the ones in config.json (bits, group_size, version or format)."""
        settings = {**settings, **{new: settings[old] for new, old in _OLD_NAMES.items() if new not in settings and old in settings}}
        version = text(settings, "version", text(settings, "format", "gemm"))
        self.version = {"llm-awq": "gemv_fast", "exllama": "gemm", "ipex": "gemm"}.get(version, version)
        if self.version not in VERSIONS:
            refuse(f"AWQ's layout {version!r}", f"use a checkpoint in one of {', '.join(VERSIONS)}")
        if whole(settings, "bits", 4) != 4:
            refuse(f"AWQ with {settings['bits']} bits", "8-bit ones exist as compressed-tensors")
        size = settings.get("group_size", 128)
        self.group_size = None if size == -1 else whole(settings, "group_size", 128)
        self.label = f"AWQ, 4 bits, {'one group a row' if self.group_size is None else f'groups of {self.group_size}'}"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if "qweight" not in headers:
            return None
        return awq_matrix(self.version, self.group_size, shape, headers)


_OLD_NAMES = {"bits": "w_bit", "group_size": "q_group_size"}


def awq_matrix(version: str, group_size: int | None, shape: tuple[int, int], headers: Headers) -> StoredMatrix:
    n, k = shape
    size = group_size or k
    why = f"layout {version} and group_size={group_size or -1}"
    if n % 8 or k % 8 or size > k or k % size:
        raise ModelLoadError(f"AWQ with groups of {size} can't hold a matrix {[n, k]}")
    groups = k // size
    if version == "gemm":
        expect(headers, "qweight", (k, n // 8), ("I32",), why)
        expect(headers, "qzeros", (groups, n // 8), ("I32",), why)
        expect(headers, "scales", (groups, n), FLOATS, why)
        unpack = partial(_unpack_gemm, shape, size)
    elif version == "gemv":
        width = _padded_width(groups, size)
        expect(headers, "qweight", (n, k // 8), ("I32",), why)
        expect(headers, "qzeros", (n, width), ("I32",), why)
        expect(headers, "scales", (n, 8 * width), FLOATS, why)
        unpack = partial(_unpack_gemv, shape, size)
    else:
        width = _padded_width(groups, size)
        if k % 64 or n % 4:
            raise ModelLoadError(f"AWQ's gemv_fast layout can't hold a matrix {[n, k]}")
        expect(headers, "qweight", (n // 4, k), ("I16",), why)
        expect(headers, "qzeros", (8 * width, n), FLOATS, why)
        expect(headers, "scales", (8 * width, n), FLOATS, why)
        unpack = partial(_unpack_gemv_fast, shape, size)
    return StoredMatrix(("qweight", "qzeros", "scales"), unpack)


def unpack_awq_order(words: torch.Tensor, count: int) -> torch.Tensor:
    """int32 [R, count / 8] with nibbles in AWQ's order -> uint8 [R, count] in the columns' own."""
    nibbles: torch.Tensor = unpack_continuous(words, 4, count).unflatten(-1, (-1, 8))[..., _COLUMNS]
    return nibbles.flatten(-2)


def _unpack_gemm(shape: tuple[int, int], size: int, tensors: Tensors) -> PackedWeight:
    n, _ = shape
    codes, zeros = unpack_awq_order(tensors["qweight"], n), unpack_awq_order(tensors["qzeros"], n)
    return integers(codes.T.contiguous(), 4, tensors["scales"].T, zeros.T, (1, size))


def _unpack_gemv(shape: tuple[int, int], size: int, tensors: Tensors) -> PackedWeight:
    groups = shape[1] // size
    codes, zeros = unpack_continuous(tensors["qweight"], 4, shape[1]), unpack_continuous(tensors["qzeros"], 4, groups)
    return integers(codes, 4, tensors["scales"][:, :groups], zeros, (1, size))


def _unpack_gemv_fast(shape: tuple[int, int], size: int, tensors: Tensors) -> PackedWeight:
    (n, k), groups = shape, shape[1] // size
    # Four rows' chunks of 64 inputs lie one after the other, read four nibbles of 16 bits at a time: [N/4, K/64, row, 64].
    rows = unpack_continuous(tensors["qweight"], 4, 4 * k).view(n // 4, k // 64, 4, 64).transpose(1, 2).reshape(n, k // 32, 32)
    # Within 32: pairs were dealt to eights (0 1 8 9 16 17 24 25, ...), then each eight's even places put before its odd ones.
    eights = rows.view(n, k // 32, 4, 2, 4).transpose(3, 4)  # [.., eight, pair, member]
    codes = eights.transpose(2, 3).reshape(n, k)
    scales, group = expand_blocks(tensors["scales"][:groups].T.float(), shape, (1, size))
    mins, _ = expand_blocks(tensors["qzeros"][:groups].T.float(), shape, (1, size))
    return PackedWeight(codes.view(torch.int8), scales, mins, QuantScheme("int4", group, symmetric=False))


def _padded_width(groups: int, size: int) -> int:
    """Words that hold the groups' zeros, rounded up to what the GEMV kernels load at once."""
    multiple = 1 if size >= 128 else {64: 2, 32: 4}.get(size)
    if multiple is None:
        raise ModelLoadError(f"AWQ's GEMV layouts know groups of 32, 64, 128 and more, not {size}")
    return -(-groups // (8 * multiple)) * multiple
