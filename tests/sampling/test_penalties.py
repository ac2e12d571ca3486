"""Penalties against transformers (repetition) and OpenAI's published formula (presence, frequency) in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import Row, make_row
from transformers import RepetitionPenaltyLogitsProcessor

from minfer.sampling.penalties import Penalties

VOCAB = 30
tokens = st.lists(st.integers(0, VOCAB - 1), max_size=12)


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def expected(logits: torch.Tensor, row: Row) -> torch.Tensor:
    """One row [V]: transformers' repetition penalty, then mu - c * frequency - (c > 0) * presence."""
    params = row.params
    seen = torch.tensor([row.prompt_token_ids + row.output_token_ids], dtype=torch.int64)
    out = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))(seen, logits[None].double())[0]
    counts = torch.bincount(torch.tensor(row.output_token_ids, dtype=torch.int64), minlength=VOCAB).double()
    return out - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)


penalised = st.builds(
    lambda prompt, output, r, p, f, seed: make_row(
        seed, [*prompt, 1], output, repetition_penalty=r, presence_penalty=p, frequency_penalty=f
    ),
    tokens,
    tokens,
    st.sampled_from([1.0, 1.3, 0.5]),
    st.sampled_from([0.0, 0.7, -1.0]),
    st.sampled_from([0.0, 0.4, -0.3]),
    st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(penalised, min_size=1, max_size=5), st.integers(0, 100))
def test_penalties_are_those_of_the_oracles(rows: list[Row], seed: int) -> None:
    logits = noise(len(rows), seed)
    Penalties(VOCAB)(logits, rows)
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index].double(), expected(noise(len(rows), seed)[index], row), atol=2e-6, rtol=1e-6)


def test_rows_that_do_not_ask_stay_bit_equal() -> None:
    logits = noise(3)
    Penalties(VOCAB)(logits, [make_row(), make_row(repetition_penalty=1.5), make_row()])
    assert torch.equal(logits[[0, 2]], noise(3)[[0, 2]])
    assert not torch.equal(logits[1], noise(3)[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), tokens), min_size=1, max_size=12), tokens)
def test_kept_counts_follow_an_output_that_grows_shrinks_and_changes(edits: list[tuple[int, list[int]]], prompt: list[int]) -> None:
    """Each edit drops some of the newest tokens (rejected drafts) and appends others; a fresh count must agree to the bit."""
    penalties = Penalties(VOCAB)
    row = make_row(5, [*prompt, 0], repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.2)
    for drop, more in edits:
        row.output_token_ids[max(0, len(row.output_token_ids) - drop) :] = more
        kept, fresh = noise(1), noise(1)
        penalties(kept, [row])
        Penalties(VOCAB)(fresh, [row])
        assert torch.equal(kept, fresh)


def test_several_positions_of_one_request_in_one_call() -> None:
    """Draft verification: rows share prompt and seed, and each sees its own drafted prefix."""
    prompt, drafts = [1, 2], [7, 8, 7]
    settings_ = {"repetition_penalty": 1.2, "frequency_penalty": 0.5}
    rows = [make_row(3, prompt, [4, 5, *drafts[:j]], **settings_) for j in range(4)]
    penalties = Penalties(VOCAB)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        logits = noise(4)
        penalties(logits, [rows[j] for j in order])
        for index, j in enumerate(order):
            torch.testing.assert_close(logits[index].double(), expected(noise(4)[index], rows[j]), atol=2e-6, rtol=1e-6)
    assert len(penalties._histories) == 1


def test_siblings_share_a_prompt_and_not_their_counts() -> None:
    prompt = [1, 2]
    rows = [make_row(seed, prompt, [seed + 3], presence_penalty=1.0) for seed in range(3)]
    logits = noise(3)
    Penalties(VOCAB)(logits, rows)
    for index, row in enumerate(rows):
        torch.testing.assert_close(logits[index].double(), expected(noise(3)[index], row), atol=2e-6, rtol=1e-6)


def test_histories_are_dropped_when_out_of_use() -> None:
    penalties = Penalties(VOCAB, spare_histories=8)
    for start in range(0, 400, 4):
        penalties(noise(4), [make_row(start + i, [1, i], presence_penalty=1.0) for i in range(4)])
        assert len(penalties._histories) <= 12
    many = [make_row(i, [1], presence_penalty=1.0) for i in range(50)]
    penalties(noise(50), many)
    assert all(any(history.prompt is row.prompt_token_ids for history in penalties._histories.values()) for row in many)


def test_a_long_output_costs_no_recount(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: a step looks up one new token, however long the output is."""
    from minfer.sampling.penalties import TokenHistory

    looked_up: list[int] = []
    plain = TokenHistory._entry_of
    monkeypatch.setattr(TokenHistory, "_entry_of", lambda self, token: looked_up.append(token) or plain(self, token))
    penalties = Penalties(VOCAB)
    row = make_row(presence_penalty=1.0, output=[3] * 500)
    penalties(noise(1), [row])
    for token in (4, 5, 6):
        looked_up.clear()
        row.output_token_ids.append(token)
        penalties(noise(1), [row])
        assert looked_up == [token]


@pytest.mark.parametrize("step", [1, 7, 250])
def test_an_output_of_many_different_tokens_is_counted_throughout(step: int) -> None:
    """More distinct tokens than the history has room for at first, one or many at a time."""
    penalties, row = Penalties(300), make_row(prompt=[299], frequency_penalty=0.5)
    for start in range(0, 250, step):
        row.output_token_ids += range(start, min(start + step, 250))
        logits = torch.zeros(1, 300)
        penalties(logits, [row])
        said = len(row.output_token_ids)
        assert logits[0, :said].eq(-0.5).all() and logits[0, said:].eq(0).all()


def test_prompt_tokens_past_the_vocabulary_touch_nothing() -> None:
    logits = noise(2)
    Penalties(VOCAB)(logits, [make_row(prompt=[VOCAB, VOCAB + 3, 5], repetition_penalty=2.0), make_row()])
    changed = (logits != noise(2)).nonzero().tolist()
    assert changed == [[0, 5]]


def test_an_empty_output_and_a_masked_token() -> None:
    logits = noise(1)
    logits[0, 1] = -torch.inf
    Penalties(VOCAB)(logits, [make_row(repetition_penalty=1.5, frequency_penalty=1.0)])
    assert logits[0, 1] == -torch.inf
    assert not logits.isnan().any()
