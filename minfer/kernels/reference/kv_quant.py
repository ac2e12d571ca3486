"""Quantising rows of K and V for the cache, and back: the definition that compiled kernels are held to, code for code.

A row is one token's K or V of one head, [..., D]. Arithmetic is float32 and its order is fixed (a maximum, one division a
number, the butterflies of the transform from the shortest to the longest, sums by halves), so that every backend can produce the
same codes.
"""

from __future__ import annotations

import math

import torch

from minfer.kvcache import SCALE_DTYPE, KVFormat

SCALES = tuple((8 + n) / 8 for n in range(8))  # of the one that makes the largest number representable; exact in float32


def quantize(rows: torch.Tensor, kind: KVFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """rows[..., D] -> codes[..., width] in the format's dtype, scales[...] bfloat16. A row with a NaN gets NaN as its scale."""
    assert kind.limit is not None, f"{kind.name} is not quantised"
    x = hadamard(rows.float()) if kind.rotated else rows.float()
    top = x.abs().amax(-1, keepdim=True)
    if kind.packed:  # the lowest channel among equals, so that the sign is a function of the row
        top = -x.gather(-1, x.abs().argmax(-1, keepdim=True))
    codes, scale = _encode(x, top / kind.limit, kind)
    if not kind.searched:
        return codes, scale.squeeze(-1)
    best = _error(x, codes, scale)
    for factor in SCALES[1:]:  # the first of equals; what is not a number is never better
        other, wider = _encode(x, top / kind.limit * factor, kind)
        error = _error(x, other, wider)
        better = error < best
        codes = torch.where(better, other.float(), codes.float()).to(kind.dtype)  # exact: torch doesn't select 8-bit floats
        scale, best = torch.where(better, wider, scale), torch.where(better, error, best)
    return codes, scale.squeeze(-1)


def _encode(x: torch.Tensor, scale: torch.Tensor, kind: KVFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes of x[..., D] under scale[..., 1] float32, and the scale as it is kept."""
    assert kind.limit is not None, f"{kind.name} is not quantised"
    scale = torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 0.0, scale).to(SCALE_DTYPE)  # a subnormal one is none
    x = torch.where(scale == 0, 0.0, x / scale.float())
    if kind.dtype.is_floating_point:
        return x.clamp(-kind.limit, kind.limit).to(kind.dtype), scale
    x = x.round().clamp(-kind.limit, kind.limit - kind.packed).nan_to_num()
    return _pack(x.to(torch.int8)) if kind.packed else x.to(kind.dtype), scale


def _error(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The squared error of x[..., D], [..., 1]: the upper half of the numbers added to the lower until one is left."""
    difference = codes.float() * scale.float() - x
    squares = difference * difference
    width = 1 << (x.shape[-1] - 1).bit_length()
    squares = torch.nn.functional.pad(squares, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        squares = squares[..., :width] + squares[..., width:]
    return squares


def dequantize(codes: torch.Tensor, scales: torch.Tensor, kind: KVFormat) -> torch.Tensor:
    """The rows that codes[..., width] and scales[...] stand for, [..., D] float32."""
    rows = (_unpack(codes) if kind.packed else codes).float() * scales.float()[..., None]
    return hadamard(rows) if kind.rotated else rows


def hadamard(rows: torch.Tensor) -> torch.Tensor:
    """rows[..., D] times the orthogonal Walsh-Hadamard matrix of size n along runs of n channels, n the power of two in D.

    Its own inverse. Natural order: n = 2 maps (a, b) to (a + b, a - b) / sqrt(2).
    """
    n = rows.shape[-1] & -rows.shape[-1]
    span = 1
    while span < n:
        pairs = rows.unflatten(-1, (-1, 2, span))
        rows = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), dim=-2).flatten(-3)
        span *= 2
    return rows * (1 / math.sqrt(n))


def _pack(codes: torch.Tensor) -> torch.Tensor:
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=-1).to(torch.int8) - 8
