"""How near an engine's answers are to those of fp32 transformers on the same weights. The reference is made once and kept.

`agreement`: greedy tokens over 100 prompts x 64 tokens. `kl`: next-token distributions at the end of each prompt. `perplexity`:
through the engine's own scorer, over windows of 1,024 tokens, every prediction of a window counted (no BOS, no overlap).
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compare.measure import Numbers, coarse_kl, perplexity, prefix_agreement
from compare.process import EngineProcess
from compare.protocol import LoadOptions, Request
from compare.workloads import QualityText

TOP = 20  # what every engine can give (OpenAI's own limit)
# When a contender's speed is flagged instead of celebrated. Perplexity decides where its scorer gives one: four-bit rounding of a small
# model changes nearly every greedy continuation within a few tokens (agreement 3%) and yet costs only a fifth of perplexity.
GARBAGE_PERPLEXITY = 1.5  # times the best perplexity of the run
GARBAGE_AGREEMENT = 0.01  # mean agreement; of 32 tokens: two first tokens in three are wrong
GATE_PROMPTS, GATE_TOKENS = 12, 32


class Reference:
    """What fp32 transformers answers. `start` gives a process with it loaded; it runs only where the file lacks something."""

    def __init__(self, file: Path, start: Callable[[], EngineProcess], vocab_size: int, limit: float) -> None:
        self._file, self._start, self._vocab_size, self._limit = file, start, vocab_size, limit
        self._data: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def tokens(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        return [tokens for tokens, _ in self._answers(prompts, max_tokens)]

    def next_logprobs(self, prompts: list[list[int]], max_tokens: int) -> list[dict[int, float]]:
        return [{int(t): v for t, v in row.items()} for _, row in self._answers(prompts, max_tokens)]

    def _answers(self, prompts: list[list[int]], max_tokens: int) -> list[Any]:
        """For each prompt its greedy tokens and next-token distribution; kept one by one, so an interrupted start costs nothing."""
        keys = [hashlib.sha256(json.dumps([prompt, max_tokens]).encode()).hexdigest()[:16] for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._data}
        if missing:
            with self._start() as process:
                for key, prompt in missing.items():
                    tokens = greedy(process, [prompt], max_tokens, self._limit, self._vocab_size)[0]
                    logprobs = process.ask("next_logprobs", self._limit, contexts=[prompt], top=TOP)["logprobs"][0]
                    self._data[key] = [tokens, logprobs]
                    self._save()
        return [self._data[key] for key in keys]

    def _save(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._data))
        partial.replace(self._file)


def reference_options(device: str, threads: int, vocab_size: int, max_context: int) -> LoadOptions:
    return LoadOptions("fp32", device, threads, max_context, max_concurrency=1, vocab_size=vocab_size)


def greedy(process: EngineProcess, prompts: list[list[int]], max_tokens: int, limit: float, vocab_size: int) -> list[list[int]]:
    traces = process.generate([Request(p, max_tokens) for p in prompts], limit, vocab_size)
    return [t.token_ids for t in traces]


def agreement(process: EngineProcess, text: QualityText, reference: Reference, limit: float, vocab_size: int) -> Numbers:
    ours = greedy(process, text.prompts, text.max_tokens, limit, vocab_size)
    return prefix_agreement(ours, reference.tokens(text.prompts, text.max_tokens))


def divergence(process: EngineProcess, text: QualityText, reference: Reference, limit: float) -> Numbers:
    """Mean and largest coarse KL, and how often the most likely token is the reference's."""
    theirs = reference.next_logprobs(text.prompts, text.max_tokens)
    ours = [{int(t): v for t, v in row.items()} for row in process.ask("next_logprobs", limit, contexts=text.prompts, top=TOP)["logprobs"]]
    kls = [coarse_kl(p, q) for p, q in zip(theirs, ours, strict=True)]
    same = [max(p, key=p.__getitem__) == max(q, key=q.__getitem__) for p, q in zip(theirs, ours, strict=True)]
    return {"kl": statistics.fmean(kls), "kl_max": max(kls), "top1_share": statistics.fmean(same)}


def text_perplexity(process: EngineProcess, text: QualityText, limit: float) -> Numbers:
    if not text.windows:
        raise NotImplementedError("no text was given: --text FILE (WikiText-2's test split, for instance)")
    logprobs: list[list[float]] = []
    for window in text.windows:  # one by one: some engines hold the logits of every position
        logprobs += process.ask("score", limit, windows=[window])["logprobs"]
    for window, row in zip(text.windows, logprobs, strict=True):
        if len(row) != len(window) - 1:
            raise ValueError(f"{len(row)} log-probabilities for a window of {len(window)} tokens")
    return {"perplexity": perplexity(logprobs), "predictions": float(sum(map(len, logprobs)))}
