"""Calibration data that needs no file: the model's own texts, sampled from nothing but its first token.

What a model says is close to what it was trained on, in the proportions it has learned, and it is at hand for every model.
Sampled at temperature 1, each with a seed of its own, so the same seed gives the same samples.
"""

from __future__ import annotations

from minfer.engine.llm import LLM
from minfer.sampling_params import SamplingParams


def self_samples(llm: LLM, samples: int, seqlen: int, seed: int = 0, *, show_progress: bool = True) -> list[list[int]]:
    """`samples` lists of `seqlen` ids. An end of text doesn't end a sample: another text begins."""
    tokenizer = llm.get_tokenizer()
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else next(iter(tokenizer.eos_token_ids), 0)
    params = [SamplingParams(max_tokens=seqlen - 1, temperature=1.0, ignore_eos=True, seed=seed + n) for n in range(samples)]
    outputs = llm.generate([{"prompt_token_ids": [first]} for _ in range(samples)], params, use_tqdm=show_progress)
    return [[first, *output.outputs[0].token_ids] for output in outputs]
