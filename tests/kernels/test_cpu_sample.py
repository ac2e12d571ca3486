"""The compiled draw against float64 numpy that sorts everything, on every instruction set."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernels.draws import LARGEST, Wish, allowed, logits_of, rows_of

from minfer.errors import ConfigError
from minfer.kernels.cpu import CpuBackend


def draw(cpu: CpuBackend, logits: torch.Tensor, wishes: list[Wish]) -> list[int]:
    asked, positions, _ = rows_of(wishes)
    return cpu.sample(logits, asked, positions).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [1, 2, 63, 64, 65, 200, 5000])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_draws(cpu: CpuBackend, width: int, spread: float) -> None:
    filters = list(itertools.product((0, 1, 7, 100, width), (1.0, 0.9, 0.3), (0.0, 0.05)))
    uniforms = (0.0, 0.123, 0.5, 0.77, 0.999999)
    wishes = [(u, t, float(k), p, m) for u in uniforms for t in (0.6, 1.7) for k, p, m in filters]
    logits = logits_of(len(wishes), width, spread, width)
    asked, positions, exact = rows_of(wishes)
    tokens = cpu.sample(logits, asked, positions).tolist()
    for row, wish, token in zip(logits.double().numpy(), exact, tokens, strict=True):
        assert token in allowed(row, wish), wish


def test_a_draw_is_never_a_masked_token_and_never_past_the_end(cpu: CpuBackend) -> None:
    logits = logits_of(4, 130, 2.0, 1)
    left = [3, 64, 129]
    logits[:, [i for i in range(130) if i not in left]] = -torch.inf
    wishes = [(LARGEST, 1.0, 0.0, 1.0, 0.0), (LARGEST, 1.0, 50.0, 1.0, 0.0), (LARGEST, 1.0, 0.0, 0.999, 0.0), (0.0, 1e-35, 0.0, 1.0, 0.0)]
    for token in draw(cpu, logits, wishes):
        assert token in left


def test_greedy_takes_the_lowest_id_among_equals(cpu: CpuBackend) -> None:
    logits = torch.zeros(2, 1000)
    logits[0, [700, 701, 999]] = 5.0
    assert draw(cpu, logits, [(0.9, 0.0, 0.0, 1.0, 0.0)] * 2) == [700, 0]


def test_rows_without_a_distribution_are_told_and_harm_no_other(cpu: CpuBackend) -> None:
    logits = logits_of(6, 100, 1.0, 2)
    logits[0, 99] = torch.nan
    logits[1, 5] = torch.nan
    logits[2, 50] = torch.inf
    logits[3] = -torch.inf
    wishes: list[Wish] = [(0.5, 1.0, 0.0, 1.0, 0.0)] * 5 + [(0.5, 0.0, 0.0, 1.0, 0.0)]
    tokens = draw(cpu, logits, wishes)
    assert tokens[:4] == [-1] * 4
    assert tokens[4] == draw(cpu, logits[4:5], wishes[4:5])[0]
    assert tokens[5] == logits[5].argmax().item()


def test_frequencies_are_the_distribution(cpu: CpuBackend) -> None:
    """Evenly spread numbers, one in each 4000th, reach each of the tokens that top-k leaves as often as its probability says."""
    count = 4000
    logits = logits_of(1, 300, 1.5, 3).expand(count, -1)
    tokens = draw(cpu, logits, [((i + 0.5) / count, 0.8, 20.0, 1.0, 0.0) for i in range(count)])
    got = torch.bincount(torch.tensor(tokens), minlength=300) / count
    top = logits[0].double().topk(20)
    expected = torch.zeros(300, dtype=torch.float64).scatter(0, top.indices, (top.values / 0.8).softmax(0))
    assert (got - expected).abs().max() < 2.01 / count


def test_wrong_types_are_an_error(cpu: CpuBackend) -> None:
    logits, wishes, positions = torch.zeros(1, 8), torch.zeros(1, 6, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ConfigError, match="float64 wishes"):
        cpu.sample(logits, wishes[:, :4], positions)
    for wrong in (positions.float(), torch.zeros(2, dtype=torch.int32)):
        with pytest.raises(ConfigError, match="positions"):
            cpu.sample(logits, wishes, wrong)


@pytest.mark.parametrize("width", [1, 63, 64, 200, 4096])
def test_the_likeliest_token_and_its_probability(cpu: CpuBackend, width: int) -> None:
    logits = logits_of(6, width, 2.0, width)
    logits[4], logits[5, width // 2] = -torch.inf, torch.nan
    tokens, chances = cpu.likeliest(logits)
    exact = logits[:4].double().softmax(-1)
    assert tokens.tolist() == [*exact.argmax(-1).tolist(), -1, -1]
    torch.testing.assert_close(chances[:4].double(), exact.amax(-1), rtol=1e-5, atol=0)
    assert chances[4:].isnan().all()
    strided = torch.zeros(6, width + 7)[:, :width].copy_(logits)
    assert cpu.likeliest(strided)[0].tolist() == tokens.tolist()
    with pytest.raises(ConfigError, match="float32"):
        cpu.likeliest(logits.double())
