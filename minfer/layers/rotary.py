"""Rotary position embedding (Su 2021) as one table of cosines and sines, [positions, D] float32, made at load.

Row p is cos(p * f_0 .. p * f_{D/2-1}) followed by the sines. The base frequencies f_i = theta^(-2i/D) are stretched by the
checkpoint's scaling to reach contexts longer than the model was trained on:

    linear    every frequency divided by a factor                                     (Chen 2023)
    dynamic   theta grows with the context length (NTK-aware)                         (bloc97 2023)
    llama3    long wavelengths divided, short ones kept, the middle blended           (Llama 3.1)
    yarn      the same idea by dimension, plus a factor on cos and sin                (Peng 2023)

`dynamic` is defined by the length of the current sequence, but keys in the cache were rotated when it was shorter. minfer
fixes the table once, for the longest sequence the engine admits: consistent at every length, and equal to transformers for
a sequence of that length or of the trained one.
"""

from __future__ import annotations

import math

import torch

from minfer.errors import ModelLoadError
from minfer.model_config import RopeConfig


def rope_table(rope: RopeConfig, dim: int, max_len: int, device: torch.device) -> torch.Tensor:
    """cos | sin of every position below `max_len`, [max_len, dim] float32."""
    frequencies, factor = _scaled_frequencies(rope, dim, max_len)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), frequencies)  # [max_len, D/2]
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * factor).to(device)


def _scaled_frequencies(rope: RopeConfig, dim: int, max_len: int) -> tuple[torch.Tensor, float]:
    """The D/2 frequencies in radians per token, and the factor on cos and sin."""
    frequencies = _frequencies(rope.theta, dim)
    if rope.freq_factors is not None:
        if len(rope.freq_factors) != dim // 2:
            raise ModelLoadError(f"the checkpoint has {len(rope.freq_factors)} rope frequency factors, expected {dim // 2}")
        frequencies = frequencies / torch.tensor(rope.freq_factors)
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "dynamic":
        trained = _original(rope)
        length = max(max_len, trained)
        theta = rope.theta * (rope.factor * length / trained - (rope.factor - 1)) ** (dim / (dim - 2))
        return _frequencies(theta, dim), 1.0
    if rope.kind == "llama3":
        return _llama3(frequencies, rope), 1.0
    if rope.kind == "yarn":
        return _yarn(frequencies, rope, dim)
    return frequencies, 1.0


def _frequencies(theta: float, dim: int) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    wavelength = 2 * math.pi / frequencies
    turns = _original(rope) / wavelength  # full turns within the trained context
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def _yarn(frequencies: torch.Tensor, rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    def dimension_turning(times: float) -> float:
        """The (fractional) dimension whose frequency makes this many turns within the trained context."""
        return dim * math.log(_original(rope) / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    stretched = frequencies / rope.factor * ramp + frequencies * (1 - ramp)
    return stretched, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _original(rope: RopeConfig) -> int:
    if rope.original_max_position is None:
        raise ModelLoadError(f"rope scaling {rope.kind!r} needs original_max_position_embeddings, which config.json does not have")
    return rope.original_max_position
