"""The sampler against transformers' warpers (in float64), chi-square, and itself in other company."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import Row, draws, make_row, sample_once
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from minfer.errors import ConfigError
from minfer.sampling import Sampler
from minfer.sampling.ranking import BLOCK
from minfer.sampling_params import SamplingParams

SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.8},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 40, "temperature": 0.6},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 0.99, "temperature": 2.0},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 0.3, "temperature": 1.5},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"typical_p": 0.9, "temperature": 0.8},
    {"top_k": 30, "top_p": 0.8},
    {"top_k": 30, "min_p": 0.02},
    {"top_p": 0.9, "min_p": 0.02},
    {"top_k": 50, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.7, "temperature": 1.3},
    {"top_p": 0.8, "typical_p": 0.5},
]


def oracle(logits: torch.Tensor, params: dict[str, float]) -> torch.Tensor:
    """Probabilities [V] float64, by transformers, in the order that sampling_params.py writes down."""
    chain = LogitsProcessorList()
    if "temperature" in params:
        chain.append(TemperatureLogitsWarper(params["temperature"]))
    if "top_k" in params:
        chain.append(TopKLogitsWarper(int(params["top_k"])))
    if "top_p" in params:
        chain.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        chain.append(MinPLogitsWarper(params["min_p"]))
    if "typical_p" in params:
        chain.append(TypicalLogitsWarper(params["typical_p"]))
    return chain(torch.zeros(1, 1, dtype=torch.int64), logits[None].double())[0].softmax(-1)


def chi_square_ok(tokens: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Pearson's test, cells of small expectation pooled; the limit is five sigma of the chi-square (Wilson-Hilferty)."""
    n = len(tokens)
    seen = torch.bincount(tokens, minlength=len(probabilities)).double()
    if (seen[probabilities == 0] > 0).any():
        return False
    large = probabilities * n >= 10
    seen = torch.cat((seen[large], seen[~large].sum()[None]))
    expected = torch.cat((probabilities[large], probabilities[~large].sum()[None])) * n
    seen, expected = seen[expected > 1], expected[expected > 1]
    freedom = len(expected) - 1
    if freedom < 1:
        return True
    statistic = float(((seen - expected) ** 2 / expected).sum())
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 5


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("vocab", [23, 300])
def test_distribution_is_that_of_transformers(params: dict[str, float], vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(vocab, generator=generator) * 2
    probabilities = oracle(logits, params)
    tokens = draws(logits, 6000, **params)
    assert set(tokens.tolist()) <= set(probabilities.nonzero()[:, 0].tolist())
    assert chi_square_ok(tokens, probabilities)


def test_chi_square_notices_a_small_tilt() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert not chi_square_ok(draws(logits, 6000, temperature=1.15), oracle(logits, {}))


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_every_surviving_token_can_be_drawn_and_no_other(params: dict[str, float]) -> None:
    """The inverse CDF over a fine grid of uniforms must visit exactly the oracle's support, each for its share."""
    vocab = 200
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) * 1.5
    probabilities = oracle(logits, params)
    grid = 4096
    rows = [make_row(i, **params) for i in range(grid)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minfer.sampling.sampler.uniforms", lambda seeds, positions: (np.array(seeds) + 0.5) / grid)
        tokens = torch.tensor(sample_once(logits[None].repeat(grid, 1), rows))
    share = torch.bincount(tokens, minlength=vocab).double() / grid
    assert (share - probabilities).abs().max() <= 1.01 / grid


def mixed_rows(generator: torch.Generator, count: int) -> list[Row]:
    def number(limit: int) -> int:
        return int(torch.randint(0, limit, (1,), generator=generator))

    extra = [{"temperature": 0.0}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.5, "presence_penalty": 0.2}, {"min_tokens": 9}]
    choices = SETTINGS + extra
    return [
        make_row(number(1 << 40), [number(50) for _ in range(3)], [number(50) for _ in range(number(8))], **choices[number(len(choices))])
        for _ in range(count)
    ]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([5, 64, 130, 1000]), st.sampled_from([None, 0.0625, 1.0]))
def test_a_row_alone_is_that_row_in_a_batch(seed: int, vocab: int, step: float | None) -> None:
    """Also on a grid of logits, where ties are everywhere as they are in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, vocab, generator=generator) * 3
    if step:
        logits = (logits / step).round() * step
    rows = mixed_rows(generator, 12)
    for row in rows:
        row.prompt_token_ids = [token % vocab for token in row.prompt_token_ids]
        row.output_token_ids = [token % vocab for token in row.output_token_ids]
    together = sample_once(logits, rows)
    assert together == [sample_once(logits[i : i + 1], rows[i : i + 1])[0] for i in range(12)]
    assert together[3:9] == sample_once(logits[3:9], rows[3:9])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([5, 64, 130, 1000, 5000]), st.sampled_from([None, 0.0625, 1.0]))
def test_ranking_a_few_candidates_picks_what_sorting_everything_does(seed: int, vocab: int, step: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, vocab, generator=generator) * 3
    if step:
        logits = (logits / step).round() * step
    rows = [make_row(i, **params) for i, params in enumerate(SETTINGS)]
    fast = sample_once(logits, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minfer.sampling.sampler.rank", lambda logits, maxima, bound: sorted_whole(logits))
        assert fast == sample_once(logits, rows)


def sorted_whole(logits: torch.Tensor) -> object:
    from minfer.sampling.ranking import Ranked

    return Ranked(*torch.sort(logits, dim=-1, descending=True, stable=True))


def test_the_vocabulary_of_a_real_model_and_a_very_flat_row() -> None:
    """A flat row's nucleus is far larger than the first candidates; the second look must find all of it."""
    vocab = 49152
    logits = torch.rand(3, vocab, generator=torch.Generator().manual_seed(1))
    for params in ({"top_p": 0.97}, {"top_p": 0.97, "min_p": 0.5}, {"top_p": 1 - 1e-12}):
        rows = [make_row(i, **params) for i in range(3)]
        fast = sample_once(logits, rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("minfer.sampling.sampler.rank", lambda logits, maxima, bound: sorted_whole(logits))
            assert fast == sample_once(logits, rows)


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 129, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_id_among_equals(vocab: int, dtype: torch.dtype) -> None:
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype).float()
    logits[20:] = (logits[20:] * 2).round()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert sample_once(logits, [make_row(i, temperature=0) for i in range(40)]) == expected
    assert sample_once(logits, [make_row(i, top_k=1) for i in range(40)]) == expected
    assert sample_once(logits, [make_row(i, top_p=1e-9) for i in range(40)]) == expected
    assert sample_once(logits, [make_row(i, top_p=1e-9, top_k=3) for i in range(40)]) == expected


def test_all_equal_logits_tie_to_id_zero_and_draw_evenly() -> None:
    logits = torch.zeros(100)
    assert sample_once(logits[None], [make_row(temperature=0)]) == [0]
    assert chi_square_ok(draws(logits, 6000), torch.full((100,), 0.01, dtype=torch.float64))
    assert set(draws(logits, 500, top_k=10).tolist()) == set(range(10))
    assert set(draws(logits, 500, top_p=0.095).tolist()) == set(range(10))


def test_rows_with_minus_infinity_never_yield_a_masked_token() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(len(SETTINGS), 500, generator=generator)
    allowed = torch.rand(logits.shape, generator=generator) < 0.02
    allowed[:, 77] = True
    logits = logits.masked_fill(~allowed, -torch.inf)
    for seed in range(50):
        tokens = sample_once(logits, [make_row(seed, **params) for params in SETTINGS])
        assert all(allowed[i, token] for i, token in enumerate(tokens))


@pytest.mark.parametrize("params", [{"temperature": 0.0}, *SETTINGS], ids=str)
@pytest.mark.parametrize("bad", [-torch.inf, torch.inf, torch.nan])
def test_a_hopeless_row_is_named_and_harms_no_other(params: dict[str, float], bad: float) -> None:
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(4))
    rows = [make_row(i, **params) for i in range(3)]
    sound = sample_once(logits, rows)
    logits[1] = bad if bad == -torch.inf else logits[1]
    logits[1, 150] = bad
    output = Sampler(200).sample(logits.clone(), rows)
    assert output.failed == [1]
    assert output.token_ids == [sound[0], 0, sound[2]]


def test_extreme_temperatures() -> None:
    logits = torch.tensor([[1.0, 5.0, 4.9999, -3.0]])
    for temperature in (1e-300, 1e-45, 1e-20, 1e-6):
        for extra in ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5}, {"typical_p": 0.9}):
            assert sample_once(logits, [make_row(9, temperature=temperature, **extra)]) == [1]
    assert chi_square_ok(draws(logits[0], 4000, temperature=100.0), (logits[0].double() / 100).softmax(-1))


@pytest.mark.parametrize("top_k", [10, 1000, 10**400])  # the last is more than a float holds
def test_top_k_past_the_vocabulary_is_no_filter(top_k: int) -> None:
    logits = torch.randn(30, 10, generator=torch.Generator().manual_seed(0))
    rows = [make_row(i) for i in range(30)]
    wide = [make_row(i, top_k=top_k) for i in range(30)]
    assert sample_once(logits, rows) == sample_once(logits, wide)
    wishes: list[torch.Tensor] = []

    def draw(logits: torch.Tensor, asked: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        wishes.append(asked)
        return logits.argmax(-1)

    sample_once(logits, rows, draw=draw)
    sample_once(logits, wide, draw=draw)
    assert wishes[0].equal(wishes[1])


def test_seeds_and_positions_decide_the_draw() -> None:
    logits = torch.zeros(1, 1000)
    first = sample_once(logits, [make_row(1)])
    assert first == sample_once(logits, [make_row(1)])
    assert first != sample_once(logits, [make_row(2)])
    assert first != sample_once(logits, [make_row(1, output=[5])])
    assert first == sample_once(logits, [make_row(1, prompt=[9, 9], output=[5])])  # the position counts, not where the prompt ends


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"logit_bias": {7: 30.0}},
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"min_tokens": 9},
        {"bad_word_token_ids": ((3,),)},
        {"logprobs": 1},
        {"temperature": 1.0},
    ],
)
def test_the_short_way_for_greedy_batches_changes_nothing(params: dict[str, Any]) -> None:
    """With an argmax at hand, plainly greedy batches take a short way; every other setting must not."""
    row = Row(SamplingParams(**{"temperature": 0.0, **params}), prompt_token_ids=[5, 1], output_token_ids=[3, 3])
    logits = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    logits[:, 3] = logits.max() + 0.5
    rows = [Row(SamplingParams(temperature=0.0)), row]
    short = Sampler(200, argmax=lambda x: x.argmax(-1)).sample(logits.clone(), rows)
    assert short == Sampler(200).sample(logits.clone(), rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_short_way_names_hopeless_rows_too(bad: float) -> None:
    logits = torch.randn(2, 200)
    logits[1] = bad
    output = Sampler(200, argmax=lambda x: x.argmax(-1)).sample(logits, [Row(SamplingParams(temperature=0.0))] * 2)
    assert output.failed == [1]


def test_empty_batch() -> None:
    output = Sampler(10).sample(torch.zeros(0, 10), [])
    assert (output.token_ids, output.logprobs, output.failed) == ([], [], [])


@pytest.mark.parametrize("logits", [torch.zeros(1, 9), torch.zeros(2, 10), torch.zeros(1, 10, dtype=torch.float16)])
def test_wrong_logits_are_refused(logits: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="float32 logits of shape"):
        Sampler(10).sample(logits, [make_row()])


def test_own_processors_run_after_the_built_in_ones() -> None:
    def only_seven(logits: torch.Tensor, rows: object) -> None:
        logits[:, :7] = -torch.inf
        logits[:, 8:] = -torch.inf

    assert sample_once(torch.randn(2, 20), [make_row(temperature=0), make_row()], processors=[only_seven]) == [7, 7]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("step", [None, 0.0625])
def test_a_gpu_picks_the_same_tokens(step: float | None) -> None:
    logits = torch.randn(len(SETTINGS) + 1, 5000, generator=torch.Generator().manual_seed(2)) * 3
    if step:
        logits = (logits / step).round() * step
    params = [{"temperature": 0.0, "repetition_penalty": 1.2, "logit_bias": {3: 1.0}, "min_tokens": 2}, *SETTINGS]
    rows = [make_row(i, logprobs=4, **values) for i, values in enumerate(params)]
    here = Sampler(5000).sample(logits.clone(), rows)
    there = Sampler(5000, "cuda").sample(logits.cuda(), rows)
    assert here.token_ids == there.token_ids
    for ours, theirs in zip(here.logprobs, there.logprobs, strict=True):
        assert ours is not None
        assert theirs is not None
        assert (ours.rank, ours.top_token_ids) == (theirs.rank, theirs.top_token_ids)
        assert ours.top_logprobs == pytest.approx(theirs.top_logprobs, abs=1e-5)


def test_blocks_do_not_show() -> None:
    """The winner sits in every place of a block, and past the last whole one."""
    vocab = 2 * BLOCK + 5
    logits = torch.full((vocab, vocab), -1.0)
    logits.fill_diagonal_(9.0)
    rows = [make_row(temperature=0) for _ in range(vocab)]
    assert sample_once(logits, rows) == list(range(vocab))
    assert sample_once(logits * 100, [make_row(i) for i in range(vocab)]) == list(range(vocab))
    assert sample_once(logits * 100, [make_row(i, top_p=0.9) for i in range(vocab)]) == list(range(vocab))
