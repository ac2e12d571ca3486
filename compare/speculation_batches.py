"""What drafts bring or cost at batch 1 to 32: one answer, in which every few steps they are switched off or on again.

A machine that others use too is now 10% faster and now 10% slower, for seconds at a time, so two answers one after the other say little
about a difference of 2%. Neighbouring blocks of a few steps of the same answer do: each pair of blocks, one with drafts and one without,
is a comparison, and there are hundreds. The figure is tokens per second over all blocks with drafts to that over all without, sums, so that
a dear step counts however rare it is; the interval is that of drawing other pairs. Drafts that are under way when they are switched off
are thrown away, which counts against them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from compare.measure import percentile
from minfer import LLM, SamplingParams
from minfer.engine.core import CoreStep

BLOCK = 8  # steps
PARAMS = SamplingParams(temperature=0, max_tokens=160)
Block = tuple[float, int]  # seconds, tokens


class Switch:
    """In the place of the engine's step: turns drafts off and on, and keeps the blocks of steps that decode only."""

    def __init__(self, llm: LLM, *, begin_with: bool) -> None:
        self.core = llm.engine.core
        self.speculation = self.core.speculation
        self.step = self.core.step
        self.blocks: dict[bool, list[Block]] = {True: [], False: []}
        self.on, self.steps = begin_with, 0
        self._seconds, self._tokens, self._started = 0.0, 0, time.perf_counter()

    def __call__(self) -> CoreStep:
        if self.steps == BLOCK:
            self.blocks[self.on].append((self._seconds, self._tokens))
            self.on, self.steps, self._seconds, self._tokens = not self.on, 0, 0.0, 0
            for request in self.core.scheduler.running:
                request.draft_token_ids, request.draft_parents = [], []
        self.core.speculation = self.speculation if self.on else None
        self._started = time.perf_counter()
        done = self.step()
        if done.plan.scheduled and all(item.decodes for item in done.plan.scheduled):
            self.steps += 1
            self._seconds += time.perf_counter() - self._started
            self._tokens += sum(len(item.drawn) for item in done.plan.scheduled)
        return done


def answer(llm: LLM, chats: Sequence[Any], *, drafts_first: bool) -> tuple[list[list[int]], list[dict[str, float]]]:
    """What it says, and the pairs of blocks."""
    core = llm.engine.core
    switch = Switch(llm, begin_with=drafts_first)
    core.step = switch  # type: ignore[method-assign]
    try:
        outputs = llm.chat(chats, PARAMS, use_tqdm=False)
    finally:
        core.step = switch.step  # type: ignore[method-assign]
        core.speculation = switch.speculation
    pairs = [
        {"seconds": own[0], "tokens": own[1], "plain_seconds": plain[0], "plain_tokens": plain[1]}
        for own, plain in zip(switch.blocks[True], switch.blocks[False], strict=False)
    ]
    return [list(output.outputs[0].token_ids) for output in outputs], pairs


def ratio(pairs: Sequence[dict[str, float]], draws: int = 2000) -> tuple[float, float, float]:
    """Speed with drafts to speed without, and its 95% interval over draws of as many pairs."""
    rng = random.Random(0)
    drawn = sorted(_ratio(rng.choices(pairs, k=len(pairs))) for _ in range(draws))
    return _ratio(pairs), percentile(drawn, 2.5), percentile(drawn, 97.5)


def _ratio(pairs: Sequence[dict[str, float]]) -> float:
    def total(name: str) -> float:
        return sum(pair[name] for pair in pairs)

    return total("tokens") / total("seconds") * total("plain_seconds") / total("plain_tokens")


def table(results: dict[str, Any], heading: str) -> str:
    runs = results["runs"]
    names = list(dict.fromkeys(run["variant"] for run in runs))
    lines = [
        heading,
        "",
        "| open chat, batch | " + " | ".join(f"{name}: plain, tokens/s | with drafts | against plain" for name in names) + " |",
        "|---" * (3 * len(names) + 1) + "|",
    ]
    for batch in sorted({run["batch"] for run in runs}):
        cells = []
        for name in names:
            pairs = [pair for run in runs if (run["batch"], run["variant"]) == (batch, name) for pair in run["pairs"]]
            if not pairs:
                cells += ["", "", ""]
                continue
            plain = sum(pair["plain_tokens"] for pair in pairs) / sum(pair["plain_seconds"] for pair in pairs)
            middle, low, high = ratio(pairs)
            cells += [f"{plain:,.0f}", f"{middle * plain:,.0f}", f"{middle:.3f}x ({low:.3f} to {high:.3f}, {len(pairs)} pairs)"]
        lines.append(f"| {batch} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
