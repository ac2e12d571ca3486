"""From logits to the next token: masks and penalties, filters, one seeded draw per row, log-probabilities.

`Sampler.sample(logits, rows)` is the whole interface that a step needs; `derive_seed` is called once when a request is
admitted; `prompt_logprobs` scores a prompt that is already known.
"""

from __future__ import annotations

from minfer.sampling.logprobs import RowLogprobs, prompt_logprobs
from minfer.sampling.processors import LogitsProcessor, PaddedVocabulary, SamplingRow
from minfer.sampling.rng import derive_seed, uniforms
from minfer.sampling.sampler import Drawn, Sampler, SamplerOutput

__all__ = [
    "Drawn",
    "LogitsProcessor",
    "PaddedVocabulary",
    "RowLogprobs",
    "Sampler",
    "SamplerOutput",
    "SamplingRow",
    "derive_seed",
    "prompt_logprobs",
    "uniforms",
]
