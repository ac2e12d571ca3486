"""From traces to numbers. Definitions are those of `vllm bench serve`, written down because tools differ.

    TTFT   first token's time - arrival                        (queueing included)
    E2E    last token's time - arrival
    TPOT   (last - first token's time) / (tokens - 1)          one figure a request
    ITL    each gap between neighbouring tokens, pooled over requests
    prefill tokens/s   prompt tokens of all requests / time until the last first token
    decode tokens/s    tokens after every request has its first one, until the first request ends / that time
    output tokens/s    all tokens / time from the first arrival to the last token
    goodput            share of requests that met the stated TTFT and TPOT limits, and how many of those a second

A percentile is given only where the sample supports it: p90 from 10 values, p99 from 100. Pure Python: also run by `report`.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from compare.protocol import Trace

Numbers = dict[str, float]
PERCENTILES = ((50, 1), (90, 10), (99, 100))  # percentile, smallest sample it is given for


@dataclass(frozen=True)
class Slo:
    """Limits of a good answer, in seconds. Defaults: MLPerf's server limits for an 8B model (2 s, 100 ms a token)."""

    ttft: float = 2.0
    tpot: float = 0.1


def percentile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics, as numpy's default. q from 0 to 100."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def ttft(trace: Trace) -> float:
    return trace.times[0] - trace.arrival


def e2e(trace: Trace) -> float:
    return trace.times[-1] - trace.arrival


def tpot(trace: Trace) -> float | None:
    """None for a single token: it has no gap."""
    n = len(trace.times)
    return (trace.times[-1] - trace.times[0]) / (n - 1) if n > 1 else None


def inter_token(trace: Trace) -> list[float]:
    return [b - a for a, b in zip(trace.times, trace.times[1:], strict=False)]


def summarise(traces: Sequence[Trace], slo: Slo | None = None) -> Numbers:
    """All figures of one run of one case."""
    start = min(t.arrival for t in traces)
    end = max(t.times[-1] for t in traces)
    tokens = sum(len(t.times) for t in traces)
    prompt = sum(t.prompt_tokens for t in traces)
    numbers: Numbers = {
        "requests": float(len(traces)),
        "prompt_tokens": float(prompt),
        "output_tokens": float(tokens),
        "duration_s": end - start,
        "prefill_tokens_per_s": prompt / (max(t.times[0] for t in traces) - start),
        "output_tokens_per_s": tokens / (end - start),
        "total_tokens_per_s": (tokens + prompt) / (end - start),
        "requests_per_s": len(traces) / (end - start),
    }
    if (decode := decode_rate(traces)) is not None:
        numbers["decode_tokens_per_s"] = decode
    for name, values in (
        ("ttft", [ttft(t) for t in traces]),
        ("tpot", [v for t in traces if (v := tpot(t)) is not None]),
        ("itl", [v for t in traces for v in inter_token(t)]),
        ("e2e", [e2e(t) for t in traces]),
    ):
        numbers.update(spread(name, values))
    if slo is not None:
        good = sum(ttft(t) <= slo.ttft and (tpot(t) or 0.0) <= slo.tpot for t in traces)
        numbers["good_share"] = good / len(traces)
        numbers["goodput_per_s"] = good / (end - start)
    return numbers


def spread(name: str, values: Sequence[float]) -> Numbers:
    """Mean and the percentiles that the sample supports."""
    if not values:
        return {}
    known = {f"{name}_p{q}_s": percentile(values, q) for q, least in PERCENTILES if len(values) >= least}
    return {f"{name}_mean_s": statistics.fmean(values), **known}


def decode_rate(traces: Sequence[Trace]) -> float | None:
    """Tokens a second while every request is decoding: from the last first token to the first last token.

    None where there is no such window (one token each, or requests that ran one after another).
    """
    begin = max(t.times[0] for t in traces)
    end = min(t.times[-1] for t in traces)
    if end <= begin:
        return None
    return sum(sum(begin < x <= end for x in t.times) for t in traces) / (end - begin)


@dataclass(frozen=True)
class Spread:
    """Repeats of one figure: the median, and a 95% bootstrap interval of it."""

    median: float
    low: float
    high: float
    n: int
    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> Spread:
        low, high = bootstrap(values, seed)
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.median(values), low, high, len(values), statistics.fmean(values), std)


def bootstrap(values: Sequence[float], seed: int = 0, rounds: int = 2000) -> tuple[float, float]:
    """95% interval of the median by resampling, seeded: the same results file always gives the same report."""
    if len(values) < 2:
        return values[0], values[0]
    rng = random.Random(seed)
    medians = [statistics.median(rng.choices(values, k=len(values))) for _ in range(rounds)]
    return percentile(medians, 2.5), percentile(medians, 97.5)


@dataclass(frozen=True)
class PairedRatio:
    """How much faster A is than B, repeat by repeat: drift of the machine hits both halves of a pair."""

    spread: Spread

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `no clear difference` where the interval holds 1 or there are fewer than 3 pairs."""
        if self.spread.n < 3 or self.spread.low <= 1.0 <= self.spread.high:
            return "no clear difference"
        return "faster" if self.spread.low > 1.0 else "slower"


def paired_ratio(a: dict[int, float], b: dict[int, float], *, higher_is_better: bool = True) -> PairedRatio | None:
    """Ratio of the repeats that both have (keys are repeat numbers); above 1 means A is better. None without a pair."""
    common = sorted(set(a) & set(b))
    ratios = [(a[i] / b[i] if higher_is_better else b[i] / a[i]) for i in common if a[i] > 0 and b[i] > 0]
    return PairedRatio(Spread.of(ratios)) if ratios else None


def perplexity(logprobs: Sequence[Sequence[float]]) -> float:
    """exp of the mean negative log-probability over all predictions of all windows."""
    total = sum(len(w) for w in logprobs)
    return math.exp(-math.fsum(v for w in logprobs for v in w) / total)


def prefix_agreement(ours: Sequence[Sequence[int]], reference: Sequence[Sequence[int]]) -> Numbers:
    """Greedy tokens against the reference's: share before the first difference, and share of prompts without any.

    After the first difference two texts are different texts, so later matches count for nothing.
    """
    shares, exact, first = [], 0, 0
    for a, b in zip(ours, reference, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shares.append(same / len(b))
        exact += same == len(b)
        first += bool(same)
    return {"agreement": statistics.fmean(shares), "exact_share": exact / len(shares), "first_token_share": first / len(shares)}


def coarse_kl(reference: dict[int, float], ours: dict[int, float]) -> float:
    """KL(reference || ours) in nats over the tokens both lists name, with all other tokens as one.

    Engines give only their most likely tokens. Merging the rest can only lower a KL, so this is a lower bound of the true
    one, and the same one for every engine.
    """
    shared = set(reference) & set(ours)
    p = [math.exp(reference[t]) for t in shared]
    q = [math.exp(ours[t]) for t in shared]
    p.append(max(1.0 - sum(p), 1e-9))
    q.append(max(1.0 - sum(q), 1e-9))
    return max(0.0, math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
