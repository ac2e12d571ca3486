"""The edges of the inverse CDF, which random draws practically never hit: u = 0, u just below 1, and exact boundaries."""

from __future__ import annotations

import math

import pytest
import torch

from minfer.sampling.draw import Filters, draw_by_id, draw_by_rank, weigh
from minfer.sampling.ranking import BLOCK, Ranked

BELOW_ONE = 1 - 2.0**-53


def ranked_draw(logits: list[float], uniform: float, **asked: float) -> int:
    values = torch.tensor([logits])
    unit = torch.ones(1, dtype=torch.float64)
    filters = {name: unit * asked[name] if name in asked else None for name in ("top_k", "top_p", "min_p", "typical_p")}
    order = torch.sort(values, dim=-1, descending=True, stable=True)
    token, _ = draw_by_rank(Ranked(*order), values.amax(-1), Filters(unit * uniform, unit, **filters), None)
    return int(token)


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.25, 0.5, 0.75, BELOW_ONE])
def test_by_id_never_picks_weight_zero(uniform: float) -> None:
    weights = torch.zeros(1, 5 * BLOCK + 3)
    weights[0, [BLOCK + 5, 3 * BLOCK + 1]] = 1.0
    expected = BLOCK + 5 if uniform < 0.5 else 3 * BLOCK + 1
    assert draw_by_id(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [expected]


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 0.75, BELOW_ONE])
def test_by_rank_never_picks_weight_zero(uniform: float) -> None:
    logits = [-math.inf, 1.0, -math.inf, 1.0, 0.0, 1.0]
    expected = [1, 3][uniform >= 0.5]
    assert ranked_draw(logits, uniform, top_k=2) == expected
    assert ranked_draw(logits, uniform, top_k=2, typical_p=0.99) == expected


def test_each_entry_owns_the_interval_from_its_start_to_before_its_end() -> None:
    weights = torch.ones(1, 4)
    for step in range(8):
        assert draw_by_id(weights, torch.tensor([step / 8], dtype=torch.float64)).tolist() == [step // 2]
        assert ranked_draw([0.0] * 4, step / 8) == step // 2


def test_block_sums_that_round_up_still_end_on_a_real_token() -> None:
    """In float32, a block's sum can exceed that of its entries; a draw in the gap must not run past them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        weights = torch.rand(64, 4 * BLOCK, generator=generator)
        weights[:, BLOCK - 7 : BLOCK] = 0
        weights[:, -5:] = 0
        uniform = torch.full((64,), BELOW_ONE, dtype=torch.float64)
        ends = weights.view(64, 4, BLOCK).sum(-1).double().cumsum(-1)
        for target in (uniform, (ends[:, 0] / ends[:, -1]) * BELOW_ONE):
            tokens = draw_by_id(weights, target)
            assert (weights.gather(1, tokens[:, None]) > 0).all()


def test_equal_to_the_threshold_is_kept() -> None:
    for uniform, token in ((0.1, 0), (0.6, 2)):
        assert ranked_draw([2.0, -9.0, 2.0], uniform, min_p=1.0) == token
    assert ranked_draw([0.0, 0.0, 0.0, 0.0], BELOW_ONE, top_p=0.5) == 1  # half the mass is reached by two, exactly


def test_weigh_overwrites_with_exponentials() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 5
    temperature = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    best = logits.amax(-1)
    truth = ((logits - best[:, None]).double() / temperature[:, None]).exp()
    weights = logits.clone()
    assert weigh(weights, best, temperature) is weights
    torch.testing.assert_close(weights.double(), truth, rtol=1e-5, atol=0)
