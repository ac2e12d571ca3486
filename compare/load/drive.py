"""Many exchanges at once, and what they amount to."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from compare.load.exchange import Ask, Outcome, exchange


@dataclass
class Result:
    outcomes: list[Outcome]
    seconds: float

    def summary(self, ttft_limit: float | None = None) -> dict[str, Any]:
        """Latencies are those of streams that ran to their end; an ITL is the time between two events of one request."""
        done = [o for o in self.outcomes if o.ending == "done"]
        streams = [o for o in done if len(o.arrivals) > 1]
        gaps = [b - a for o in streams for a, b in zip(o.arrivals, o.arrivals[1:], strict=False)]
        good = [o for o in done if ttft_limit is None or o.arrivals[0] <= ttft_limit]
        values = {
            "requests": len(self.outcomes),
            "seconds": round(self.seconds, 3),
            "endings": dict(Counter(o.ending for o in self.outcomes)),
            "statuses": dict(Counter(str(o.status) for o in self.outcomes if o.status)),
            "events_per_s": round(sum(len(o.arrivals) for o in done) / self.seconds, 2),
            "ttft_s": percentiles([o.arrivals[0] for o in streams]),
            "itl_s": percentiles(gaps),
        }
        if ttft_limit is not None:
            values |= {"ttft_limit_s": ttft_limit, "good_per_s": round(len(good) / self.seconds, 2)}
            values |= {"good_events_per_s": round(sum(len(o.arrivals) for o in good) / self.seconds, 2)}
        return values

    @property
    def broken(self) -> list[str]:
        return [o.why for o in self.outcomes if o.ending in ("broken", "unreachable")]


def closed_loop(url: str, asks: Sequence[Ask], clients: int) -> Result:
    """`clients` at a time, each taking the next request when its last one has ended."""
    return asyncio.run(_closed(url, asks, clients))


def open_loop(url: str, asks: Sequence[Ask], rate: float, seed: int = 0) -> Result:
    """Requests at random moments, `rate` a second on average (a Poisson process), however the server fares."""
    return asyncio.run(_open(url, asks, rate, random.Random(seed)))


async def _closed(url: str, asks: Sequence[Ask], clients: int) -> Result:
    host, port = _address(url)
    queue = iter(asks)
    outcomes: list[Outcome] = []

    async def client() -> None:
        for ask in queue:
            outcomes.append(await exchange(ask, host, port))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Result(outcomes, time.perf_counter() - started)


async def _open(url: str, asks: Sequence[Ask], rate: float, rng: random.Random) -> Result:
    host, port = _address(url)
    started = due = time.perf_counter()
    tasks = []
    for ask in asks:
        due += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(exchange(ask, host, port)))
    outcomes = list(await asyncio.gather(*tasks))
    return Result(outcomes, time.perf_counter() - started)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "127.0.0.1", parts.port or 80


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median and 99th percentile; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return {"p50": round(ordered[len(ordered) // 2], 5), "p99": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))], 5)}
