"""Log-probabilities and ranks of the Triton kernels against float64 log_softmax and a sorted row."""

from __future__ import annotations

import pytest
import torch
from kernels.devices import DEVICE, randn

from minfer.errors import ConfigError
from minfer.kernels.triton.logprobs import logprobs
from minfer.kernels.triton.ranks import BLOCK


@pytest.mark.parametrize(("width", "k", "step"), [(1, 1, None), (3, 3, None), (BLOCK + 1, 0, None), (200, 5, 4.0), (4200, 20, 0.25)])
def test_against_a_sorted_row(width: int, k: int, step: float | None) -> None:
    """step: logits of few digits, so that many are equal."""
    rows = 3
    logits = 4 * randn(rows, width + 3)[:, :width]
    logits = logits if step is None else (logits / step).round() * step
    tokens = torch.tensor([0, width // 2, width - 1], device=DEVICE)
    found, top = (part.cpu() for part in logprobs(logits, tokens, k))
    truth = logits.double().log_softmax(-1).cpu()
    for row in range(rows):
        order = sorted(range(width), key=lambda i: (-float(logits[row, i]), i))
        token = int(tokens[row])
        assert top[row].tolist() == [order.index(token), *order[:k]]
        assert found[row].tolist() == pytest.approx(truth[row, [token, *order[:k]]].tolist(), abs=1e-6, rel=1e-6)
        for listed, value in zip(order[:k], found[row, 1:].tolist(), strict=True):
            assert listed != token or value == float(found[row, 0])  # the same float, picked or listed


def test_where_fewer_than_k_have_a_chance_the_others_are_listed_too() -> None:
    logits = torch.full((1, 150), -torch.inf, device=DEVICE)
    logits[0, [70, 3, 149]] = torch.tensor([2.0, 1.0, 1.0], device=DEVICE)
    found, top = logprobs(logits, torch.tensor([0], device=DEVICE), 5)
    assert top.tolist() == [[3, 70, 3, 149, 0, 1]]
    assert found[0, [0, 4, 5]].tolist() == [-torch.inf] * 3
    assert found[0, 1].item() == pytest.approx(-0.551444, abs=1e-6)  # -log(1 + 2 / e)


def test_what_it_refuses() -> None:
    logits, tokens = randn(2, 8), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ConfigError, match=r"k of 0 to 8, not torch.float32 and 9"):
        logprobs(logits, tokens, 9)
    with pytest.raises(ConfigError, match=r"tokens must have shape \[2\]"):
        logprobs(logits, tokens[:1], 1)
    found, top = logprobs(logits[:0], tokens[:0], 2)
    assert found.shape == top.shape == (0, 3)
