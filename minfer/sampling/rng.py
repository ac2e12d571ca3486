"""Random numbers as a pure function of (seed, position), so a request draws the same tokens whatever runs beside it.

A generator with state would have to be stored, rolled back with rejected drafts and replayed after a preemption. A
counter-based one, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), needs none of
that: the key is the request's seed, the counter is the number of tokens so far. Philox rather than a shorter hash because
Triton and CUDA have the same one, so that the op table's `sample` makes the very same numbers where it draws. Here they are made for
draws that torch composes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STREAM_TOKEN = 0  # the draw that picks a token; other purposes (verifying drafts, say) take other streams
STREAM_SEED = 1

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MASK64 = (1 << 64) - 1
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_ROUNDS = 10
_ROUND_STEPS = np.arange(_ROUNDS, dtype=np.uint64)[:, None, None] * _KEY_STEPS  # [10, 2, 1]


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 of `counter` [4, R] under `key` [2, R], 32-bit words held in uint64; returns [4, R] such words.

    The four words are kept as an even pair (0, 2), which is multiplied, and an odd pair (1, 3), so that one round is five
    array operations whatever the number of rows.
    """
    even, odd = counter[0::2], counter[1::2]  # [2, R] each
    keys = (key + _ROUND_STEPS) & _MASK32  # [10, 2, R]
    for round_key in keys:
        product = even * _MULTIPLIERS  # 32 x 32 bits: fits 64
        even = (product >> _SHIFT32)[::-1] ^ odd ^ round_key
        odd = (product & _MASK32)[::-1]
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(seeds: Sequence[int], positions: Sequence[int], stream: int = STREAM_TOKEN) -> NDArray[np.float64]:
    """One float64 in [0, 1), a multiple of 2^-53, for each pair; different streams are independent of each other."""
    words = _words(seeds, positions, stream)
    bits: NDArray[np.uint64] = (words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))  # 53 bits
    return np.ldexp(bits.astype(np.float64), -53)


def key_words(seed: int) -> tuple[int, int]:
    """The 32-bit words that a seed's key consists of, the lower one first."""
    return seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF


def derive_seed(seed: int | None, index: int = 0) -> int:
    """The 64-bit seed of the `index`-th of a request's n samples; a new one from the system when `seed` is None.

    Index 0 keeps the seed itself, so the first of n samples is the one that n=1 would have given.
    """
    if seed is None:
        return int.from_bytes(os.urandom(8), "little")
    if index == 0:
        return seed & _MASK64
    words = _words([seed], [index], STREAM_SEED)
    return int(words[0, 0]) << 32 | int(words[1, 0])


def _words(seeds: Sequence[int], positions: Sequence[int], stream: int) -> NDArray[np.uint64]:
    key = np.array([seed & _MASK64 for seed in seeds], dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    counter = np.zeros((4, len(key)), dtype=np.uint64)
    counter[0], counter[1], counter[2] = position & _MASK32, position >> _SHIFT32, stream
    return philox(counter, np.stack((key & _MASK32, key >> _SHIFT32)))
