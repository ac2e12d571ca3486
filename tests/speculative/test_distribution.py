"""Sampled output behind drafts is distributed as the model says: chi-square against transformers, for every proposer, place by place.

A bias leaves three tokens to choose from, so that of four places all 81 outcomes have a known probability and are seen often. The long
matrix draws 100,000 outputs from each proposer, what runs always a fiftieth of that.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from speculative.conftest import IDS
from speculative.test_speculation import BASE, SPECULATIVE

from minfer import LLM, SamplingParams

FEW, PLACES, TEMPERATURE = IDS[10:13].tolist(), 4, 0.4
PROMPT = [7, *FEW, FEW[1], FEW[0], FEW[2], *FEW]
PROPOSERS = ("ngram", "twin", "stranger", "skip", "eagle", "eagle3", "eagle3 tree", "medusa", "medusa tree", "redrafter")


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> dict[tuple[int, ...], float]:
    """The probability of every output, from transformers in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64, attn_implementation="eager")
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for place in range(PLACES):
        said = [output for output in found if len(output) == place]
        with torch.inference_mode():
            logits = model(torch.tensor([PROMPT + list(output) for output in said])).logits[:, -1, FEW]
        for output, row in zip(said, (logits / TEMPERATURE).softmax(-1).tolist(), strict=True):
            found |= {(*output, token): found[output] * chance for token, chance in zip(FEW, row, strict=True)}
    return {output: chance for output, chance in found.items() if len(output) == PLACES}


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_samples_follow_the_model(
    tiny_llama: Path,
    make_checkpoint: Any,
    head_folders: dict[str, Path],
    expected: dict[tuple[int, ...], float],
    proposer: str,
    count: int,
) -> None:
    folders = {"twin": tiny_llama, **head_folders}
    options: dict[str, Any] = {**BASE, **SPECULATIVE, "num_draft_tokens": 4, "max_num_seqs": 250}
    if proposer == "stranger":
        folders[proposer] = make_checkpoint("llama", seed=5)
    if proposer in ("ngram", "skip"):
        options |= {"speculative": proposer} | ({"skip_layers": "1"} if proposer == "skip" else {})
    else:
        options |= {"speculative": "draft", "draft_model": str(folders[proposer.removesuffix(" tree")])}
        options["draft_top_k"] = 3 if proposer.endswith("tree") else 1
    llm = LLM(str(tiny_llama), **options)
    bias = dict.fromkeys(FEW, 90.0)
    seen: Counter[tuple[int, ...]] = Counter()
    for start in range(0, count, 250):
        params = [
            SamplingParams(temperature=TEMPERATURE, seed=seed, max_tokens=PLACES, ignore_eos=True, logit_bias=bias)
            for seed in range(start, start + 250)
        ]
        outputs = llm.generate([{"prompt_token_ids": PROMPT}] * 250, params, use_tqdm=False)
        seen.update(tuple(output.outputs[0].token_ids) for output in outputs)
    stats = llm.engine.core.speculation.stats  # type: ignore[union-attr]
    assert stats.num_accepted_tokens > count // 10
    assert proposer == "twin" or stats.num_accepted_tokens < stats.num_draft_tokens
    assert set(seen) <= set(expected)
    check(seen, expected)
    for place in range(PLACES):
        ours, theirs = Counter[tuple[int, ...]](), dict.fromkeys(((token,) for token in FEW), 0.0)
        for output, chance in expected.items():
            ours[output[place],] += seen[output]
            theirs[output[place],] += chance
        check(ours, theirs)


def check(seen: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> None:
    """Chi-square below what one in 10,000 exceeds (Wilson and Hilferty); outcomes expected fewer than 5 times count as one."""
    total = sum(seen.values())
    rare = [output for output, chance in chances.items() if chance * total < 5]
    cells = [(seen[output], chance * total) for output, chance in chances.items() if output not in rare]
    if rare:
        cells.append((sum(seen[output] for output in rare), sum(chances[output] for output in rare) * total))
    freedom = len(cells) - 1
    chi_square = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < limit, f"{chi_square:.1f} with {freedom} degrees of freedom, of which one in 10,000 is above {limit:.1f}"


def test_the_check_can_fail() -> None:
    seen = Counter(dict.fromkeys(itertools.product((0, 1), repeat=3), 100))
    check(seen, dict.fromkeys(seen, 1 / 8))
    seen[0, 0, 0] += 90
    with pytest.raises(AssertionError, match="7 degrees"):
        check(seen, dict.fromkeys(seen, 1 / 8))
