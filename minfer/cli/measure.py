"""One measured run of the engine: a batch of random prompts from arrival to last token, timed step by step."""

from __future__ import annotations

import copy
import random
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minfer.engine.core import StepTimes
    from minfer.engine.engine import Engine
    from minfer.engine.outputs import RequestOutput
    from minfer.speculative import SpeculationStats

# The parts of a step that are the host's own; the rest of it is the model.
HOST_PARTS = ("schedule", "build", "sample", "update")


@dataclass(frozen=True)
class Shape:
    prompt_tokens: int
    output_tokens: int
    batch_size: int


@dataclass(frozen=True)
class Run:
    """Seconds are wall-clock. Prefill ends, and decode begins, with the step in which the last request gets its first token."""

    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    decode_steps: int
    first_token_s: list[float]  # of each request, from its arrival
    host_s_per_step: dict[str, float]  # over the decode steps
    peak_blocks: int
    cached_tokens: int
    preemptions: int
    speculation: SpeculationStats | None = None

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prefill_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.decode_tokens / self.decode_s if self.decode_steps else None


def measure(engine: Engine, shape: Shape, rng: random.Random) -> Run:
    """Runs one batch to its end. Every prompt is drawn anew from `rng`; the requests take the LoRA adapters in turn."""
    params = SamplingParams(max_tokens=shape.output_tokens, ignore_eos=True, temperature=0.0)
    prompts = [[rng.randrange(engine.inputs.vocab_size) for _ in range(shape.prompt_tokens)] for _ in range(shape.batch_size)]
    adapters = engine.config.adapters or (None,)
    speculation = engine.core.speculation
    guessed = copy.deepcopy(speculation.stats) if speculation is not None else None
    started = time.perf_counter()
    for n, ids in enumerate(prompts):
        engine.add_request(f"bench-{n}", ids, params, lora=adapters[n % len(adapters)], kind="delta")
    begun: set[str] = set()
    last: dict[str, RequestOutput] = {}
    peak = 0
    while len(begun) < shape.batch_size:
        for output in engine.step():
            last[output.request_id] = output
            begun.add(output.request_id)
        peak = max(peak, engine.core.scheduler.pool.num_used)
    middle = time.perf_counter()
    before = _snapshot(engine.core.times)
    tokens = steps = 0
    while engine.has_unfinished_requests:
        for output in engine.step():
            last[output.request_id] = output
            tokens += sum(len(completion.token_ids) for completion in output.outputs)
        steps += 1
        peak = max(peak, engine.core.scheduler.pool.num_used)
    decode_s = time.perf_counter() - middle
    spent = {part: after - before[part] for part, after in _snapshot(engine.core.times).items()}
    outside = decode_s - sum(spent.values())  # detokenising and what else surrounds the loop
    host = {part: spent[part] / steps for part in HOST_PARTS} | {"output": outside / steps} if steps else {}
    outputs = list(last.values())
    return Run(
        prefill_tokens=shape.batch_size * shape.prompt_tokens,
        prefill_s=middle - started,
        decode_tokens=tokens,
        decode_s=decode_s,
        decode_steps=steps,
        first_token_s=[output.metrics.time_to_first_token_s or 0.0 for output in outputs],
        host_s_per_step=host,
        peak_blocks=peak,
        cached_tokens=sum(output.num_cached_tokens for output in outputs),
        preemptions=sum(output.metrics.num_preemptions for output in outputs),
        speculation=speculation.stats.since(guessed) if speculation is not None and guessed is not None else None,
    )


def _snapshot(times: StepTimes) -> dict[str, float]:
    return {part: getattr(times, part) for part in (*HOST_PARTS, "forward", "wait")}


def peak_memory() -> int:
    """The most bytes of memory that this process has had resident."""
    try:
        # Unlike getrusage's number, this one doesn't count what the process that started us had.
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
