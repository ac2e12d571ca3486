"""What a row of the KV cache stands for, written from the formats' definitions in float64 numpy: no code of the project's."""

from __future__ import annotations

import numpy as np
import torch

LIMITS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0, torch.uint8: 8.0}
QUANTISED = list(LIMITS)
ROTATED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8)
SEARCHED = (torch.float8_e4m3fn, torch.float8_e5m2)


def float8_values(dtype: torch.dtype) -> np.ndarray:
    """The number of each of the 256 bit patterns (OCP OFP8), NaN and infinities as NaN."""
    exponent_bits, mantissa_bits, bias = (4, 3, 7) if dtype == torch.float8_e4m3fn else (5, 2, 15)
    values = np.empty(256)
    for code in range(256):
        exponent, mantissa = code >> mantissa_bits & (2**exponent_bits - 1), code & (2**mantissa_bits - 1)
        part = mantissa / 2**mantissa_bits
        size = 2.0 ** (1 - bias) * part if exponent == 0 else 2.0 ** (exponent - bias) * (1 + part)
        special = exponent == 2**exponent_bits - 1 and (mantissa == 7 if mantissa_bits == 3 else True)
        values[code] = np.nan if special else -size if code & 128 else size
    return values


def walsh_hadamard(dim: int) -> np.ndarray:
    """Orthogonal, block-diagonal in the largest power of two that divides dim: Sylvester's construction."""
    n = dim & -dim
    block = np.ones((1, 1))
    while block.shape[0] < n:
        block = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), block)
    return np.kron(np.eye(dim // n), block / np.sqrt(n))


def codes_of(stored: torch.Tensor) -> np.ndarray:
    """Stored elements [..., width] -> the numbers that the scale multiplies, [..., D] float64."""
    raw = stored.contiguous().view(torch.uint8).numpy()
    if stored.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return float8_values(stored.dtype)[raw]
    if stored.dtype == torch.int8:
        return raw.astype(np.float64) - 256.0 * (raw > 127)
    return np.concatenate((raw % 16, raw // 16), axis=-1).astype(np.float64) - 8


def rows_of(stored: torch.Tensor, scales: torch.Tensor) -> np.ndarray:
    """Stored elements and scales -> K or V, [..., D] float64."""
    with np.errstate(invalid="ignore"):  # what was never written may be anything
        numbers = codes_of(stored) * scales.double().numpy()[..., None]
    return numbers @ walsh_hadamard(numbers.shape[-1]) if stored.dtype in ROTATED else numbers
