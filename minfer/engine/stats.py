"""`RequestStats`: how long requests wait and run, how long they are and how they end, as histograms and counters.

Plain integers in lists, since every token of every request passes here: an observation is a binary search and an addition. What a
monitoring system wants to read is made of it elsewhere (`server/metrics.py`), when it is asked for.

The engine's sequences are what is counted: a request with n=4 is four here, as in vLLM.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from minfer.engine.core import CoreStep
from minfer.engine.watch import Watcher
from minfer.scheduler import Request

# Upper bounds in seconds or tokens: vLLM's, so that boards and alerts carry over, and finer ones where small models are faster.
TTFT_BOUNDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BOUNDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COUNT_BOUNDS = (1, 2, 5, 10, 20)
LENGTH_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)

FINISH_REASONS = ("stop", "length", "abort", "error")


class Histogram:
    """Counts of values by upper bound (inclusive); the last count is of those above all bounds. One thread writes, any may read."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(slots=True)
class _Life:
    """One sequence's moments so far, and how many tokens it has said."""

    arrived: float
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float = 0.0
    said: int = 0


class RequestStats(Watcher):
    """Seconds from arrival to first token, between tokens, to the end; queue, prefill and decode apart; lengths; endings."""

    def __init__(self) -> None:
        self.time_to_first_token = Histogram(TTFT_BOUNDS)
        self.inter_token_latency = Histogram(TOKEN_BOUNDS)  # one a step and sequence, also where a step brings several tokens
        self.time_per_output_token = Histogram(TOKEN_BOUNDS)  # one a sequence: its mean after the first token
        self.e2e_latency = Histogram(REQUEST_BOUNDS)
        self.queue_time = Histogram(REQUEST_BOUNDS)
        self.prefill_time = Histogram(REQUEST_BOUNDS)
        self.decode_time = Histogram(REQUEST_BOUNDS)
        self.inference_time = Histogram(REQUEST_BOUNDS)
        self.step_tokens = Histogram(STEP_BOUNDS)
        self.prompt_length = Histogram(LENGTH_BOUNDS)
        self.output_length = Histogram(LENGTH_BOUNDS)
        self.params_n = Histogram(COUNT_BOUNDS)
        self.params_max_tokens = Histogram(LENGTH_BOUNDS)
        self.num_prompt_tokens = 0  # of sequences that got as far as their first step
        self.num_cached_tokens = 0  # those of them that were in the cache already
        self.num_output_tokens = 0
        self.ended_by = dict.fromkeys(FINISH_REASONS, 0)
        self._lives: dict[Request, _Life] = {}

    def added(self, requests: Sequence[Request], arrived: float) -> None:
        for request in requests:
            self._lives[request] = _Life(arrived)
        self.params_n.observe(len(requests))
        if requests[0].params.max_tokens is not None:
            self.params_max_tokens.observe(requests[0].params.max_tokens)

    def stepped(self, step: CoreStep, started: float, ended: float) -> None:
        self.step_tokens.observe(step.plan.num_tokens)
        for item in step.plan.scheduled:
            life = self._lives.get(item.request)
            if life is None:
                continue
            if life.scheduled is None:
                life.scheduled = started
                self.num_prompt_tokens += item.request.num_prompt_tokens
                self.num_cached_tokens += item.request.num_cached_tokens
            said = len(item.request.output_token_ids)  # what follows a stop string has been taken back by now
            if said == life.said:
                continue
            self.num_output_tokens += said - life.said
            if life.first_token is None:
                life.first_token = ended
                self.time_to_first_token.observe(ended - life.arrived)
            else:
                self.inter_token_latency.observe(ended - life.last_token)
            life.last_token, life.said = ended, said

    def ended(self, requests: Sequence[Request], at: float) -> None:
        for request in requests:
            life = self._lives.pop(request, None)
            if life is None:
                continue
            self.ended_by[request.finish_reason or "error"] += 1
            self.e2e_latency.observe(at - life.arrived)
            self.prompt_length.observe(request.num_prompt_tokens)
            self.output_length.observe(life.said)
            self._phases(life)

    def _phases(self, life: _Life) -> None:
        """Of a sequence that got so far: one that was given up in the queue has no phases."""
        if life.scheduled is None:
            return
        self.queue_time.observe(life.scheduled - life.arrived)
        if life.first_token is None:
            return
        self.prefill_time.observe(life.first_token - life.scheduled)
        self.decode_time.observe(life.last_token - life.first_token)
        self.inference_time.observe(life.last_token - life.scheduled)
        if life.said > 1:
            self.time_per_output_token.observe((life.last_token - life.first_token) / (life.said - 1))
