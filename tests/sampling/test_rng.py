"""Philox against the known answers of its authors' library (Random123, kat_vectors), and the draws' statistics."""

from __future__ import annotations

import numpy as np
import pytest

from minfer.sampling.rng import STREAM_SEED, STREAM_TOKEN, derive_seed, key_words, philox, uniforms

KNOWN = [  # counter, key, result of philox4x32-10
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(*texts: str) -> np.ndarray:
    return np.array([[int(word, 16) for word in text.split()] for text in texts], dtype=np.uint64).T


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    assert (philox(words(counter), words(key)) == words(result)).all()


def test_known_answers_in_one_call() -> None:
    counters, keys, results = zip(*KNOWN, strict=True)
    assert (philox(words(*counters), words(*keys)) == words(*results)).all()


def test_uniforms_fill_the_unit_interval_evenly() -> None:
    n = 40000
    for values in (uniforms([7] * n, range(n)), uniforms(range(n), [7] * n), uniforms(range(n), [7] * n, STREAM_SEED)):
        assert values.min() >= 0
        assert values.max() < 1
        counts, _ = np.histogram(values, bins=100, range=(0, 1))
        assert ((counts - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * np.sqrt(2 * 99)


def test_neighbouring_positions_seeds_and_streams_are_uncorrelated() -> None:
    n = 40000
    base = uniforms([7] * n, range(n))
    others = [uniforms([7] * n, range(1, n + 1)), uniforms([8] * n, range(n)), uniforms([7] * n, range(n), STREAM_TOKEN + 5)]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / np.sqrt(n)
        joint, _, _ = np.histogram2d(base, other, bins=10, range=((0, 1), (0, 1)))
        assert ((joint - n / 100) ** 2 / (n / 100)).sum() < 99 + 5 * np.sqrt(2 * 99)


def test_uniforms_depend_on_the_pair_alone() -> None:
    seeds, positions = [5, -1, 2**63, 5, 0], [1, 2, 3, 2**33, 0]
    together = uniforms(seeds, positions)
    assert [uniforms([s], [p])[0] for s, p in zip(seeds, positions, strict=True)] == together.tolist()
    assert len(set(together.tolist())) == 5


def test_all_64_bits_of_a_seed_count() -> None:
    assert len({float(uniforms([1 << bit], [0])[0]) for bit in range(64)}) == 64


def test_the_words_of_a_key() -> None:
    for seed in (0, 1, 2**32 - 1, 2**32, 0x123456789ABCDEF0, 2**64 - 1):
        low, high = key_words(seed)
        counter = np.array([[9], [0], [STREAM_TOKEN], [0]], dtype=np.uint64)
        drawn = philox(counter, np.array([[low], [high]], dtype=np.uint64))
        assert int(uniforms([seed], [9])[0] * 2**32) == drawn[0, 0]
    assert key_words(-1) == key_words(2**64 - 1) == (2**32 - 1, 2**32 - 1)


def test_derived_seeds() -> None:
    assert derive_seed(42) == derive_seed(42, 0) == 42
    assert derive_seed(-1) == 2**64 - 1
    siblings = [derive_seed(42, index) for index in range(128)]
    assert siblings == [derive_seed(42, index) for index in range(128)]
    assert len(set(siblings) | {derive_seed(43, index) for index in range(128)}) == 256
    assert all(0 <= seed < 2**64 for seed in siblings)
    streams = np.array([uniforms([seed] * 2000, range(2000)) for seed in siblings[:8]])
    assert np.abs(np.corrcoef(streams) - np.eye(8)).max() < 5 / np.sqrt(2000)


def test_without_a_seed_every_request_gets_its_own() -> None:
    assert len({derive_seed(None, 0) for _ in range(100)}) == 100
