"""GGUF blocks unpacked without loss: bit-equal to the gguf package's own dequantiser, on random bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

import minfer.quant.gguf_vectors
from minfer.quant.gguf import PACKED_TYPES, unpack_gguf

KINDS = sorted(PACKED_TYPES)
# Where a block's float16 scales are, in bytes, if not at its beginning; MXFP4, NVFP4 and IQ1_M have none in one piece.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}
HALVES |= {"NVFP4": (), "IQ1_M": (), "TQ1_0": (52,), "TQ2_0": (64,)}


def random_matrix(kind: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Any bytes are codes; a block's float16 scales are kept finite."""
    _, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    if kind == "MXFP4":
        data[:, :, 0] %= 254  # the last two exponents overflow with the values
    if kind == "IQ1_M":
        data[:, :, 55] &= 0xBF  # the top digit of a float16 that is finite
    for at in HALVES.get(kind, (0,)):
        data[:, :, at : at + 2] = rng.normal(0, 0.1, (rows, blocks, 1)).astype(np.float16).view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_dequantised_values_are_bit_equal_to_the_gguf_packages(kind: str) -> None:
    data = random_matrix(kind, 7, 3)
    packed = unpack_gguf(kind, data)
    assert packed is not None
    expected = torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]))
    assert torch.equal(packed.dequantize(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_all_zero_block_is_zero(kind: str) -> None:
    packed = unpack_gguf(kind, np.zeros_like(random_matrix(kind, 2, 1)))
    assert packed is not None
    assert packed.dequantize().abs().max() == 0


def test_vectors_and_digits_take_four_bits() -> None:
    """The values that an IQ or TQ type can say are few enough for a table, whatever its codebook holds."""
    for kind in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"):
        packed = unpack_gguf(kind, random_matrix(kind, 5, 2, seed=3))
        assert packed is not None
        assert packed.scheme.element == ("int4" if kind.startswith("TQ") else "table4")


def test_large_matrices_are_taken_apart_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_matrix("IQ3_XXS", 5, 3)
    whole = unpack_gguf("IQ3_XXS", data)
    monkeypatch.setattr(minfer.quant.gguf_vectors, "CHUNK", 4)
    pieces = unpack_gguf("IQ3_XXS", data)
    assert whole is not None and pieces is not None
    assert torch.equal(whole.codes, pieces.codes) and torch.equal(whole.scales, pieces.scales)


def test_types_without_this_form_are_left_to_the_loader() -> None:
    assert unpack_gguf("Q1_0", np.zeros((1, 18), np.uint8)) is None


def test_rows_and_concatenation_keep_the_values() -> None:
    one, two = (unpack_gguf("Q4_1", random_matrix("Q4_1", 6, 2, seed)) for seed in (1, 2))
    assert one is not None
    assert two is not None
    order = torch.tensor([3, 0, 5])
    assert torch.equal(one.rows(order).dequantize(), one.dequantize()[order])
    both = type(one).concatenate([one, two])
    assert torch.equal(both.dequantize(), torch.cat((one.dequantize(), two.dequantize())))
