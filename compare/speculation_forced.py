"""Speed as a function of acceptance: a large shape of random weights, a small drafter, and drafts that are right as often as wanted.

Random weights agree with no drafter, so what a drafter would be worth on a real model of that shape can't be seen by running one. It can
be computed, if what it costs is real: the drafter runs its passes as ever, and its drafts are then replaced, each by the token that
the target is known to say next, or with the rest of the probability by another one.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from compare.errors import CompareError
from minfer import LLM, SamplingParams
from minfer.scheduler import Request, ScheduledRequest
from minfer.speculative import DraftTree, Proposer
from minfer.speculative.policy import NO_BAR, Bar

RATES = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)
PROMPT = list(range(100, 164))


class Forced:
    """`inner` drafts and pays for it; what it drafts is replaced. `rate` None drafts nothing."""

    def __init__(self, inner: Proposer, vocab_size: int) -> None:
        self.after, self.tells_chances = inner.after, inner.tells_chances
        self.inner, self.vocab_size = inner, vocab_size
        self.truth: list[int] = []
        self.rate: float | None = None
        self._random = random.Random(1)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self.inner.copy_blocks(copies)

    def follow(self, scheduled: Sequence[ScheduledRequest], states: Sequence[torch.Tensor], rows: Sequence[Sequence[int]]) -> None:
        self.inner.follow(scheduled, states, rows)

    def propose(self, requests: Sequence[Request], counts: Sequence[int], bar: Bar) -> list[list[int]]:
        if self.rate is None:
            return [[] for _ in requests]
        drafts = self.inner.propose(requests, counts, NO_BAR)
        made = [len(own.tokens if isinstance(own, DraftTree) else own) for own in drafts]
        return [self._replaced(request, count) for request, count in zip(requests, made, strict=True)]

    def _replaced(self, request: Request, count: int) -> list[int]:
        at = len(request.output_token_ids)
        assert self.rate is not None, "checked by propose"
        return [token if self._random.random() < self.rate else (token + 1) % self.vocab_size for token in self.truth[at : at + count]]


def measure(target: str, drafter: str, quant: str, drafts: int, tokens: int, rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Tokens per second, from the first token to the last, at each of `RATES` and without drafts (rate None), in turns."""
    options: dict[str, Any] = {"load_format": "dummy", "quant": quant, "max_model_len": 256, "kv_cache_memory": 2**28, "seed": 0}
    options |= {"speculative": "draft", "draft_model": drafter, "num_draft_tokens": drafts, "adaptive_drafts": False, "max_num_seqs": 1}
    llm = LLM(target, **options)
    speculation = llm.engine.core.speculation
    if speculation is None:
        raise CompareError("the engine was loaded without its drafter")
    forced = Forced(speculation.sources[0].proposer, llm.engine.model_config.vocab_size)
    speculation.sources[0].proposer = forced
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    def run(rate: float | None) -> dict[str, Any]:
        forced.rate = rate
        before = speculation.stats.snapshot()
        output = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)[0]
        said = list(output.outputs[0].token_ids)
        if forced.truth and said != forced.truth:
            raise CompareError("speculation changed the output")
        forced.truth = said
        metrics = output.metrics
        now = speculation.stats.snapshot()
        steps = now["drafts"] - before["drafts"]
        length = 1 + (now["accepted_tokens"] - before["accepted_tokens"]) / steps if steps else 1.0
        took = (metrics.last_token_time or 0.0) - (metrics.first_token_time or 0.0)
        return {"rate": rate, "tokens_per_s": (tokens - 1) / took, "tokens_a_step": length}

    run(None)
    for number in range(rounds):
        for rate in (None, *RATES)[:: -1 if number % 2 else 1]:
            yield [run(rate)]


def table(results: dict[str, Any]) -> str:
    def median(figure: str, rate: float | None) -> float:
        return float(statistics.median(run[figure] for run in results["runs"] if run["rate"] == rate))

    plain = median("tokens_per_s", None)
    lines = [
        f"The {results['target']} shape in {results['quant']}, random weights, drafts by the {results['drafter']} shape, "
        f"{results['drafts']} a step, each right with the given probability; medians; `{results['command']}`.",
        "",
        "| a draft is right | tokens/s | tokens a step | against plain |",
        "|---|---|---|---|",
        f"| no drafts | {plain:.2f} | 1.0 | 1.00x |",
    ]
    for rate in sorted({run["rate"] for run in results["runs"] if run["rate"] is not None}):
        speed = median("tokens_per_s", rate)
        lines.append(f"| {rate:.0%} | {speed:.2f} | {median('tokens_a_step', rate):.1f} | {speed / plain:.2f}x |")
    return "\n".join(lines) + "\n"
