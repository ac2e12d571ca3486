"""The candidate search against sorting everything, in plain Python."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minfer.sampling.ranking import BLOCK, block_maxima, block_sums, count_ahead, first_argmax, kth_bound, rank

VALUES = st.sampled_from([-torch.inf, -3.4e38, -2.5, -1e-45, -0.0, 0.0, 1e-45, 0.5, 2.5, 3.4e38])
SIZES = st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 7])


def matrix(data: st.DataObject, size: int, rows: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    special = torch.tensor(data.draw(st.lists(VALUES, min_size=1, max_size=6)))
    picks = special[torch.randint(0, len(special), (rows, size), generator=generator)]
    return torch.where(torch.rand(rows, size, generator=generator) < 0.7, picks, torch.randn(rows, size, generator=generator))


@settings(max_examples=80, deadline=None)
@given(st.data(), SIZES)
def test_ranks_argmax_and_counts_agree_with_sorting(data: st.DataObject, size: int) -> None:
    logits = matrix(data, size)
    maxima = block_maxima(logits)
    orders = [sorted(range(size), key=lambda i, row=row: (-row[i], i)) for row in logits.tolist()]
    assert first_argmax(logits, maxima).tolist() == [order[0] for order in orders]
    k = data.draw(st.integers(1, 2 * size))
    ranked = rank(logits, maxima, kth_bound(maxima, torch.full((3,), k), k))
    for row, order in enumerate(orders):
        assert ranked.ids[row, :k].tolist() == order[: min(k, ranked.ids.shape[1])]
        assert ranked.values[row, :k].tolist() == logits[row, order[:k]].tolist()
    tokens = torch.tensor([data.draw(st.integers(0, size - 1)) for _ in orders])
    assert count_ahead(logits, maxima, tokens).tolist() == [order.index(t) for order, t in zip(orders, tokens.tolist(), strict=True)]


@settings(max_examples=40, deadline=None)
@given(st.data(), SIZES)
def test_a_bound_leaves_out_nothing_that_reaches_it(data: st.DataObject, size: int) -> None:
    logits = matrix(data, size)
    bound = logits[:, data.draw(st.integers(0, size - 1))]
    ranked = rank(logits, block_maxima(logits), bound)
    for row in range(3):
        reaching = {i for i, value in enumerate(logits[row].tolist()) if value >= float(bound[row])}
        assert reaching == set(ranked.ids[row, : len(reaching)].tolist())
        assert (ranked.values[row, len(reaching) :] == -torch.inf).all()


def test_blocks_cover_the_row_once() -> None:
    for size in (1, BLOCK, 2 * BLOCK + 3):
        values = torch.rand(2, size)
        torch.testing.assert_close(block_sums(values).sum(-1), values.sum(-1))
        assert torch.equal(block_maxima(values).amax(-1), values.amax(-1))


def test_nan_shows_in_the_maximum_and_yields_no_candidates() -> None:
    logits = torch.randn(2, 200)
    logits[0, 130] = torch.nan
    maxima = block_maxima(logits)
    assert maxima.amax(-1).isnan().tolist() == [True, False]
    ranked = rank(logits, maxima, torch.tensor([torch.inf, 0.0]))
    assert (ranked.values[0] == -torch.inf).all()
