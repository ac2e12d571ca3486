"""A stand-in for the engine's Request, and other small helpers of these tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from minfer.sampling import Sampler
from minfer.sampling_params import SamplingParams


@dataclass(eq=False)
class Row:
    params: SamplingParams
    seed: int = 0
    prompt_token_ids: list[int] = field(default_factory=lambda: [1, 2, 3])
    output_token_ids: list[int] = field(default_factory=list)
    eos_token_ids: tuple[int, ...] = (2,)

    @property
    def position(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)


def make_row(seed: int = 0, prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Row:
    return Row(SamplingParams(**params), seed, [1, 2, 3] if prompt is None else prompt, output or [])


def sample_once(logits: torch.Tensor, rows: list[Row], **kwargs: Any) -> list[int]:
    output = Sampler(logits.shape[1], **kwargs).sample(logits.clone(), rows)
    assert output.failed == []
    return output.token_ids


def draws(logits: torch.Tensor, n: int, **params: Any) -> torch.Tensor:
    """n tokens from one row of logits [V], each with another seed."""
    rows = [make_row(seed, **params) for seed in range(n)]
    return torch.tensor(sample_once(logits[None].repeat(n, 1), rows))
