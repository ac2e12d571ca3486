"""Grammar masks applied on the device, against bits looked up one by one."""

from __future__ import annotations

import pytest
import torch
from kernels.devices import randn

from minfer.errors import ConfigError
from minfer.kernels.triton.forbid import forbid


@pytest.mark.parametrize(("width", "words"), [(1, 1), (31, 1), (96, 3), (100, 3), (70, 3), (5000, 150), (4096, 128)])
@pytest.mark.parametrize("some", [False, True])
def test_only_what_its_bit_allows_is_left(width: int, words: int, some: bool) -> None:
    """Fewer bits than logits (a padded vocabulary), more (a last word that is half empty), and bit 31, which makes a word negative."""
    logits = randn(4, width + 5)[:, :width]
    masked = [2, 0] if some else [0, 1, 2, 3]
    bits = torch.randint(-(2**31), 2**31, (len(masked), words), dtype=torch.int32, generator=torch.Generator().manual_seed(width))
    expected = logits.clone()
    for row, line in zip(masked, bits.tolist(), strict=True):
        for token in range(width):
            if token >= 32 * words or not line[token // 32] >> (token % 32) & 1:
                expected[row, token] = -torch.inf
    forbid(logits, bits, torch.tensor(masked) if some else None)
    assert torch.equal(logits, expected)


def test_what_it_refuses() -> None:
    logits, bits = randn(3, 40), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ConfigError, match="a row of bits for each of 3 rows, not 2"):
        forbid(logits, bits[:2])
    with pytest.raises(ConfigError, match=r"contiguous int32 bits, not torch.float32 and torch.int64"):
        forbid(logits, bits.long())
    forbid(logits, bits[:0], torch.zeros(0, dtype=torch.int64))
