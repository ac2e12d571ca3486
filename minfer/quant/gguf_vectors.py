"""GGUF's types of one to three bits, whose codes index vectors of eight or four values (IQ1, IQ2, IQ3) or are digits to base three (TQ).

Whatever vector an index stands for, its values are whole multiples of the block's scale, and a type knows few of them: six in IQ1 and
IQ2, sixteen in IQ3, three in TQ. So every such matrix is also one of 4-bit codes with a table, exactly, and the kernels for those run
it, at two to four times the file's bits instead of the eight to sixteen times of a dense copy.

The codebooks are the gguf package's: it dequantises blocks whose scale is set to one, and what comes out is divided by the factors of
the sub-blocks, which are read here:

    IQ2_XXS   66 B / 256   d f16, 8 x (4 B indices, 28 bits of signs, 4 bits s)         w = d (s + 1/2) / 4 * {8, 25, 43}
    IQ2_XS    74 B / 256   d, 64 B, 8 B of 4-bit s for 16 values each                   same
    IQ2_S     82 B / 256   d, 72 B, 8 B of 4-bit s for 16 values each                   same
    IQ3_XXS   98 B / 256   d, 64 B, 8 x (28 bits of signs, 4 bits s)                    w = d (s + 1/2) / 2 * {4, 12, ... 52, 62}
    IQ3_S    110 B / 256   d, 104 B, 4 B of 4-bit s for 32 values each                  w = d (2 s + 1) * {1, 3, ... 15}
    IQ1_S     50 B / 256   d, 32 B, 8 x 16 bits, of which bits 12..14 are s             w = d (2 s + 1) * ({-1, 0, 1} +- 1/8)
    IQ1_M     56 B / 256   48 B, 4 x 16 bits: 3-bit s for 16 values each, a digit of d  same
    TQ1_0     54 B / 256   52 B, d                                                      w = d {-1, 0, 1}
    TQ2_0     66 B / 256   64 B, d                                                      w = d {-1, 0, 1, 2}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
CHUNK = 4096  # blocks taken apart at once: the package needs many times their size

_HALF, _QUARTER, _EIGHTH = np.float32(0.5), np.float32(0.25), np.float32(0.125)
_IQ2 = (-43, -25, -8, 8, 25, 43)
_IQ3_XXS = (-62, -52, -44, -36, -28, -20, -12, -4, 4, 12, 20, 28, 36, 44, 52, 62)
_IQ3_S = tuple(range(-15, 16, 2))
_IQ1 = (-9, -7, -1, 1, 7, 9)  # in eighths


@dataclass(frozen=True)
class VectorType:
    """`factors`: of blocks [B, bytes], what each sub-block's scale is in units of d, [B, sub-blocks]. `values`: what codes 0, 1, ...
    stand for in units of that scale; empty where the code is the value. `scale_at`: the byte where d is, None where it is in pieces.
    """

    block_bytes: int
    scale_at: int | None
    factors: Callable[[Bytes], Floats]
    values: tuple[int, ...] = ()

    def unpack(self, kind: str, blocks: Bytes) -> tuple[npt.NDArray[np.int8], Floats, None]:
        """Codes [B, 256] and scales [B, sub-blocks]; no minima."""
        parts = [self._unpack(kind, blocks[begin : begin + CHUNK]) for begin in range(0, max(len(blocks), 1), CHUNK)]
        return np.concatenate([codes for codes, _ in parts]), np.concatenate([scales for _, scales in parts]), None

    def _unpack(self, kind: str, blocks: Bytes) -> tuple[npt.NDArray[np.int8], Floats]:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        unscaled, factors = blocks.copy(), self.factors(blocks)
        if self.scale_at is None:
            d = _digits(blocks)
            unscaled[:, 49::2] = unscaled[:, 49::2] & 0x0F | np.array([0x00, 0x00, 0xC0, 0x30], np.uint8)  # 0x3C00: one
        else:
            d = blocks[:, self.scale_at : self.scale_at + 2].copy().view(np.float16).astype(np.float32)
            unscaled[:, self.scale_at : self.scale_at + 2] = np.array([0x00, 0x3C], np.uint8)
        weights = dequantize(unscaled, GGMLQuantizationType[kind]).reshape(len(blocks), factors.shape[1], -1)
        codes = np.rint(weights / factors[:, :, None]).astype(np.int8)
        if self.values:
            code_of = np.zeros(256, np.int8)
            code_of[np.array(self.values, np.int8).view(np.uint8)] = np.arange(len(self.values), dtype=np.int8)
            codes = code_of[codes.view(np.uint8)]
        return codes.reshape(len(blocks), -1), d * factors


def _digits(blocks: Bytes) -> Floats:
    """IQ1_M's scale: the top four bits of four 16-bit words are a float16, lowest first."""
    tops = blocks[:, 49::2].astype(np.uint16) >> 4
    bits = tops[:, 0] | tops[:, 1] << 4 | tops[:, 2] << 8 | tops[:, 3] << 12
    scales: Floats = bits.view(np.float16).astype(np.float32)[:, None]
    return scales


def _words(data: Bytes, dtype: type[np.unsignedinteger]) -> npt.NDArray[np.unsignedinteger]:
    return np.ascontiguousarray(data).view(dtype)


def _nibbles(data: Bytes) -> Floats:
    """[B, n] -> [B, 2 n], low nibbles first."""
    pairs = np.stack((data & 15, data >> 4), axis=-1).reshape(len(data), -1)
    return pairs.astype(np.float32)


def _threes(data: Bytes) -> Floats:
    """[B, 8] -> [B, 16]: each 16-bit word holds four numbers of three bits."""
    words = _words(data, np.uint16)[:, :, None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    return words.reshape(len(data), -1).astype(np.float32)


def _ones(blocks: Bytes) -> Floats:
    return np.ones((len(blocks), 1), np.float32)


VECTOR_TYPES = {
    "IQ2_XXS": VectorType(66, 0, lambda b: ((_words(b[:, 2:], np.uint32)[:, 1::2] >> 28).astype(np.float32) + _HALF) * _QUARTER, _IQ2),
    "IQ2_XS": VectorType(74, 0, lambda b: (_nibbles(b[:, 66:]) + _HALF) * _QUARTER, _IQ2),
    "IQ2_S": VectorType(82, 0, lambda b: (_nibbles(b[:, 74:]) + _HALF) * _QUARTER, _IQ2),
    "IQ3_XXS": VectorType(98, 0, lambda b: ((_words(b[:, 66:], np.uint32) >> 28).astype(np.float32) + _HALF) * _HALF, _IQ3_XXS),
    "IQ3_S": VectorType(110, 0, lambda b: 2 * _nibbles(b[:, 106:]) + 1, _IQ3_S),
    "IQ1_S": VectorType(50, 0, lambda b: (2 * (_words(b[:, 34:], np.uint16) >> 12 & 7).astype(np.float32) + 1) * _EIGHTH, _IQ1),
    "IQ1_M": VectorType(56, None, lambda b: (2 * _threes(b[:, 48:]) + 1) * _EIGHTH, _IQ1),
    "TQ1_0": VectorType(54, 52, _ones),
    "TQ2_0": VectorType(66, 64, _ones),
}
