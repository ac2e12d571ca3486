"""GGUF's quantised blocks -> `PackedWeight`, exactly: same codes, same scales, nothing rounded again.

A row of a GGUF matrix is a sequence of blocks; each holds scales and bit-packed codes of 32 values, or of 256 in eight or
sixteen sub-blocks (the K-quants). Layouts are those of ggml-common.h:

    Q4_0   18 B / 32    d f16, 16 B: byte i holds values i and i + 16          w = d (q - 8)
    Q4_1   20 B / 32    d, m f16, 16 B as above                                w = d q + m
    Q5_0   22 B / 32    d f16, 4 B fifth bits, 16 B as above                   w = d (q - 16)
    Q5_1   24 B / 32    d, m f16, 4 B fifth bits, 16 B                         w = d q + m
    Q8_0   34 B / 32    d f16, 32 x int8                                       w = d q
    Q2_K   84 B / 256   16 B of 4-bit scales and minima, 64 B, d, dmin f16     w = d s q - dmin m
    Q3_K  110 B / 256   32 B of third bits, 64 B, 12 B of 6-bit scales, d f16  w = d (s - 32) (q - 4)
    Q4_K  144 B / 256   d, dmin f16, 12 B of 6-bit scales and minima, 128 B    w = d s q - dmin m
    Q5_K  176 B / 256   the same with 32 B of fifth bits                       w = d s q - dmin m
    Q6_K  210 B / 256   128 B, 64 B of upper two bits, 16 x int8 s, d f16      w = d s (q - 32)
    IQ4_NL 18 B / 32    d f16, 16 B as above, indices of a table of int8       w = d table[q]
    IQ4_XS 136 B / 256  d f16, 2 + 4 B of 6-bit scales, 128 B of indices       w = d (s - 32) table[q]
    MXFP4  17 B / 32    power of two e, 16 B: E2M1 values, doubled             w = 2^(e - 128) table[q]
    NVFP4  36 B / 64    4 x E4M3 scales d, 4 x 8 B: as above, of 16 values     w = d / 2 table[q]

Five- and six-bit codes become int8 codes: one byte each, but the products run at int8 speed and nothing is lost;
two and three bits become int4's. Q2_K, Q3_K, Q6_K and NVFP4 have groups of 16, all others groups of 32. The types whose codes index
vectors, and those to base three, become 4-bit codes as well: gguf_vectors.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from minfer.quant.elements import Element
from minfer.quant.gguf_vectors import VECTOR_TYPES
from minfer.quant.packed import PackedWeight, QuantScheme

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]
Unpacked = tuple[Codes, Floats, Floats | None]  # codes [B, n], scales and minima [B, n / group], for B blocks of n values

IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, -0.0, -1, -2, -3, -4, -6, -8, -12)  # doubled, as ggml has it


def unpack_gguf(kind: str, data: Bytes) -> PackedWeight | None:
    """`data` is a matrix as it lies in the file, [N, bytes of a row]; `kind` a type's name. None for types without this form."""
    if kind not in _TYPES:
        return None
    block_bytes, element, unpack, table = _TYPES[kind]
    rows = data.shape[0]
    with np.errstate(all="ignore"):  # a scale that isn't finite is the file's own
        codes, scales, mins = unpack(np.ascontiguousarray(data).reshape(-1, block_bytes))
    scheme = QuantScheme(element, codes.shape[1] // scales.shape[1], symmetric=mins is None)
    tensors = [torch.from_numpy(array.reshape(rows, -1)) for array in (codes, scales)]
    levels = torch.tensor([*table, *[0] * (16 - len(table))], dtype=torch.float32) if element == "table4" else None
    return PackedWeight(tensors[0], tensors[1], None if mins is None else torch.from_numpy(mins.reshape(rows, -1)), scheme, levels)


def _halves(blocks: Bytes, at: int) -> Floats:
    """The float16 at a byte offset of every block, [B, 1] float32."""
    values: Floats = blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)
    return values


def _nibbles(packed: Bytes) -> Codes:
    """[B, 16] -> [B, 32]: the low nibbles are the first half of the values, the high ones the second."""
    nibbles: Codes = np.concatenate((packed & 15, packed >> 4), axis=1).astype(np.int8)
    return nibbles


def _fifth_bits(packed: Bytes) -> Codes:
    """[B, 4], one bit a value, lowest first -> [B, 32] of 0 or 16."""
    bits: Codes = np.unpackbits(packed, axis=1, bitorder="little").astype(np.int8)
    return bits << 4


def _q4_0(blocks: Bytes) -> Unpacked:
    return _nibbles(blocks[:, 2:]) - np.int8(8), _halves(blocks, 0), None


def _q4_1(blocks: Bytes) -> Unpacked:
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Bytes) -> Unpacked:
    return (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks[:, 2:6])) - np.int8(16), _halves(blocks, 0), None


def _q5_1(blocks: Bytes) -> Unpacked:
    return _nibbles(blocks[:, 8:]) | _fifth_bits(blocks[:, 4:8]), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: Bytes) -> Unpacked:
    return blocks[:, 2:].view(np.int8), _halves(blocks, 0), None


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima of the eight sub-blocks, [B, 8] each.

    12 bytes hold sixteen 6-bit numbers: bytes 0..3 and 4..7 the first four scales and minima, whose two spare top bits are
    the top of the last four; bytes 8..11 hold the low four bits of those, scale low nibble, minimum high nibble.
    """
    low, mid, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((low & 63, (last & 15) | (low >> 6) << 4), axis=1)
    mins = np.concatenate((mid & 63, (last >> 4) | (mid >> 6) << 4), axis=1)
    return _halves(blocks, 0) * scales.astype(np.float32), -(_halves(blocks, 2) * mins.astype(np.float32))


def _k_nibbles(packed: Bytes) -> Codes:
    """[B, 128] -> [B, 256]: 32 bytes hold two sub-blocks, low nibbles first."""
    chunks = packed.reshape(-1, 4, 32)
    return np.stack((chunks & 15, chunks >> 4), axis=2).reshape(-1, 256).astype(np.int8)


def _q4_k(blocks: Bytes) -> Unpacked:
    return _k_nibbles(blocks[:, 16:]), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> Unpacked:
    fifth = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1)  # bit s of byte i: value i of sub-block s
    return _k_nibbles(blocks[:, 48:]) | fifth.reshape(-1, 256).astype(np.int8) << 4, *_k_scales(blocks)


def _two_bits(packed: Bytes) -> Codes:
    """[B, 64] -> [B, 256]: 32 bytes hold four runs of 32 values, the lowest two bits first."""
    runs = packed.reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    return runs.reshape(-1, 256).astype(np.int8)


def _q2_k(blocks: Bytes) -> Unpacked:
    scales, mins = blocks[:, :16] & 15, blocks[:, :16] >> 4
    return _two_bits(blocks[:, 16:80]), _halves(blocks, 80) * scales.astype(np.float32), -(_halves(blocks, 82) * mins.astype(np.float32))


def _q3_k(blocks: Bytes) -> Unpacked:
    third = np.unpackbits(blocks[:, :32, None], axis=2, bitorder="little").transpose(0, 2, 1)  # bit s of byte i: value i of run s
    low = np.concatenate((blocks[:, 96:104] & 15, blocks[:, 96:104] >> 4), axis=1)
    high = (blocks[:, None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(-1, 16)
    scales = (low | high << 4).astype(np.float32) - 32
    return (_two_bits(blocks[:, 32:96]) | third.reshape(-1, 256).astype(np.int8) << 2) - np.int8(4), _halves(blocks, 108) * scales, None


def _q6_k(blocks: Bytes) -> Unpacked:
    low = blocks[:, :128].reshape(-1, 2, 64)  # of each half: 64 low nibbles, then 64 high ones
    nibbles = np.concatenate((low & 15, low >> 4), axis=2).reshape(-1, 256).astype(np.int8)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (nibbles | _two_bits(blocks[:, 128:192]) << 4) - np.int8(32), _halves(blocks, 208) * scales, None


def _iq4_nl(blocks: Bytes) -> Unpacked:
    return _nibbles(blocks[:, 2:]), _halves(blocks, 0), None


def _iq4_xs(blocks: Bytes) -> Unpacked:
    high = blocks[:, 2:4].copy().view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3  # [B, 8], a scale's upper two bits
    low = np.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), axis=2).reshape(-1, 8)
    scales = (low | high.astype(np.uint8) << 4).astype(np.float32) - 32
    return _nibbles(blocks[:, 8:].reshape(-1, 16)).reshape(-1, 256), _halves(blocks, 0) * scales, None


def _mxfp4(blocks: Bytes) -> Unpacked:
    return _nibbles(blocks[:, 1:]), np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128), None


def _nvfp4(blocks: Bytes) -> Unpacked:
    exponents, mantissas = (blocks[:, :4] >> 3 & 15).astype(np.int32), (blocks[:, :4] & 7).astype(np.float32)
    scales = np.ldexp(np.where(exponents == 0, mantissas, 8 + mantissas), np.maximum(exponents, 1) - 11)
    scales[(blocks[:, :4] == 0) | (blocks[:, :4] == 0x7F)] = 0
    codes = blocks[:, 4:].reshape(-1, 4, 8)
    return np.concatenate((codes & 15, codes >> 4), axis=2).reshape(len(blocks), -1).astype(np.int8), scales, None


# Bytes of a block, element of the result, how to take it apart, the table where there is one.
_TYPES: dict[str, tuple[int, Element, Callable[[Bytes], Unpacked], tuple[float, ...]]] = {
    "Q4_0": (18, "int4", _q4_0, ()),
    "Q4_1": (20, "int4", _q4_1, ()),
    "Q5_0": (22, "int8", _q5_0, ()),
    "Q5_1": (24, "int8", _q5_1, ()),
    "Q8_0": (34, "int8", _q8_0, ()),
    "Q2_K": (84, "int4", _q2_k, ()),
    "Q3_K": (110, "int4", _q3_k, ()),
    "Q4_K": (144, "int4", _q4_k, ()),
    "Q5_K": (176, "int8", _q5_k, ()),
    "Q6_K": (210, "int8", _q6_k, ()),
    "IQ4_NL": (18, "table4", _iq4_nl, IQ4),
    "IQ4_XS": (136, "table4", _iq4_xs, IQ4),
    "MXFP4": (17, "table4", _mxfp4, E2M1),
    "NVFP4": (36, "table4", _nvfp4, E2M1),
}
_TYPES |= {
    name: (kind.block_bytes, "table4" if kind.values else "int4", functools.partial(kind.unpack, name), kind.values)
    for name, kind in VECTOR_TYPES.items()
}
PACKED_TYPES = frozenset(_TYPES)
