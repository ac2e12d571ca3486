"""Codes out of packed words and into them. Files pack them in four ways; all are little-endian, lowest bits first.

    continuous   a stream of bits; with 3, 5, 6 or 7 bits a code may straddle two words (GPTQ, compressed-tensors from 0.20)
    padded       32 // bits codes a word, the word's top bits unused (compressed-tensors up to 0.17)
    planar       32 codes in `bits` words: first the words of their low 4 or 2 bits, then of the next (GPTQModel's gptq_p)
    nibbles      two codes a byte (bitsandbytes puts the first into the high half, the MX and NV formats into the low one)

Each function works on the last axis; who packs along another axis transposes first.
"""

from __future__ import annotations

import torch

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # widths, lowest bits first


def as_bytes(words: torch.Tensor) -> torch.Tensor:
    """[..., W] of any type -> [..., W * bytes of one] uint8."""
    return words.contiguous().view(torch.uint8)


def unpack_continuous(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """[..., W] -> uint8 [..., count]; W words must hold at least count * bits bits."""
    stream = as_bytes(words)
    if bits in (1, 2, 4, 8):
        codes = _fields(stream, bits) if bits < 8 else stream
        return codes[..., :count]
    spare = -stream.shape[-1] % bits
    stream = torch.nn.functional.pad(stream, (0, spare)).unflatten(-1, (-1, bits))  # 8 codes fill `bits` bytes
    wide = torch.int32 if bits == 3 else torch.int64
    total = torch.zeros(stream.shape[:-1], dtype=wide, device=words.device)
    for n in range(bits):
        total |= stream[..., n].to(wide) << (8 * n)
    codes = torch.stack([(total >> (bits * n) & (2**bits - 1)).to(torch.uint8) for n in range(8)], dim=-1)
    return codes.flatten(-2)[..., :count]


def unpack_padded(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [..., W] -> uint8 [..., count], with 32 // bits codes in each word."""
    codes = [(words >> (bits * n) & (2**bits - 1)).to(torch.uint8) for n in range(32 // bits)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :count]


def unpack_planar(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [..., W] with W a multiple of `bits` -> uint8 [..., count]."""
    blocks = words.unflatten(-1, (-1, bits))  # [..., count / 32, bits]
    codes = torch.zeros(*blocks.shape[:-1], 32, dtype=torch.uint8, device=words.device)
    first = 0
    for width in _PLANES[bits]:
        codes |= unpack_continuous(blocks[..., first : first + width], width, 32) << first
        first += width
    return codes.flatten(-2)[..., :count]


def unpack_nibbles(packed: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """uint8 [..., W] -> uint8 [..., 2 W]."""
    halves = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return torch.stack(halves, dim=-1).flatten(-2)


def pack_continuous(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., count] below 2^bits -> int32 [..., ceil(count bits / 32)], the rest of the last word zero."""
    per_run = 32 if bits in (3, 5, 6, 7) else 32 // bits  # codes that fill whole words
    runs = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_run)).unflatten(-1, (-1, per_run)).long()
    words = torch.zeros(*runs.shape[:-1], per_run * bits // 32, dtype=torch.int64, device=codes.device)
    for n in range(per_run):
        word, shift = divmod(n * bits, 32)
        words[..., word] |= runs[..., n] << shift
        if shift + bits > 32:
            words[..., word + 1] |= runs[..., n] >> (32 - shift)
    needed = -(-codes.shape[-1] * bits // 32)
    return (words & 2**32 - 1).flatten(-2)[..., :needed].contiguous().view(torch.int32)[..., ::2].contiguous()


def pack_nibbles(codes: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """uint8 [..., 2 W] -> uint8 [..., W]."""
    first, second = codes[..., ::2], codes[..., 1::2]
    return first << 4 | second if high_first else second << 4 | first


def _fields(stream: torch.Tensor, bits: int) -> torch.Tensor:
    fields = [stream >> shift & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(fields, dim=-1).flatten(-2)
