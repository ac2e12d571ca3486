"""`LiveView`: what the engine is doing, for people who want to see it work.

A snapshot is made by the engine's thread between two steps, so it needs no lock and is of one moment: every number in it agrees with
every other. Steps are recorded only while somebody looks: the first snapshot enlists the view as a watcher, and ten seconds after
the last one it leaves. Nobody looking costs nothing.

What a snapshot may hold is bounded, whatever the engine is at: recorded steps, rows of a step, requests, the blocks listed of each. Where
that leaves something out the true count stands beside it. A pool larger than `MAX_CELLS` is shown in cells of several blocks.

It holds numbers only: no text, no token, nothing that could tell one client what another one wrote.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minfer.engine.core import CoreStep
from minfer.engine.watch import Watcher
from minfer.kvcache import KVCache, format_of
from minfer.scheduler import Request, RequestStatus, ScheduledRequest

if TYPE_CHECKING:
    from minfer.engine.engine import Engine

WATCHED_SECONDS = 10.0  # after the last look
MAX_STEPS = 256
MAX_ROWS = 128  # of one step
MAX_ENDED = 256
MAX_RUNNING = 256
MAX_WAITING = 64
MAX_LISTED_BLOCKS = 16384  # of all running requests together
MAX_CELLS = 16384

# What a block of the map is, and in a cell of several blocks the highest of theirs.
FREE, CACHED, USED, SHARED = range(4)
# What a request's tokens in a step were.
DECODE, PREFILL, RECOMPUTE = range(3)

_RUN = re.compile(rb"(.)\1*", re.DOTALL)


@dataclass(slots=True)
class _Life:
    """Moments of a sequence, in seconds of `time.monotonic()`."""

    arrived: float
    scheduled: float | None = None
    first_token: float | None = None


class LiveView(Watcher):
    """All of it runs in the engine's thread. Times in snapshots are whole microseconds, moments counted from this object's birth."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._born = self._looked = time.monotonic()
        self._enlisted = False
        self._steps: deque[dict[str, Any]] = deque(maxlen=MAX_STEPS)
        self._ended: deque[dict[str, Any]] = deque(maxlen=MAX_ENDED)
        self._lives: dict[Request, _Life] = {}

    @property
    def watching(self) -> bool:
        """Whether steps are being recorded."""
        return self._enlisted

    def snapshot(self) -> dict[str, Any]:
        """The engine now, as numbers that JSON can hold; docs/live-view.md explains each. Shares its lists with no later snapshot."""
        self._looked = time.monotonic()
        if not self._enlisted:
            self._enlisted = True
            self._engine.watchers.add(self)
        core = self._engine.core
        stats, speculation = core.scheduler.stats, core.speculation
        return {
            "now": self._moment(self._looked),
            "engine": self._settings(),
            "pool": self._pool(),
            "running": self._running(),
            "waiting": [_request(request) for request in core.scheduler.first_waiting(MAX_WAITING)],
            "num_running": len(core.scheduler.running),
            "num_waiting": core.scheduler.num_waiting,
            "steps": list(self._steps),
            "ended": list(self._ended),
            "counters": {
                "steps": stats.num_steps,
                "computed_tokens": stats.num_computed_tokens,
                "preemptions": stats.num_preemptions,
                "prefix_queries": stats.num_prefix_queries,
                "prefix_hits": stats.num_prefix_hits,
                "forked_tokens": stats.num_forked_tokens,
                "copied_blocks": stats.num_copied_blocks,
                "evictions": core.scheduler.pool.num_evictions,
                **(speculation.stats.snapshot() if speculation is not None else {}),
            },
        }

    def added(self, requests: Sequence[Request], arrived: float) -> None:
        for request in requests:
            self._lives[request] = _Life(arrived)

    def stepped(self, step: CoreStep, started: float, ended: float) -> None:
        if ended - self._looked > WATCHED_SECONDS:
            self._leave()
            return
        items = step.plan.scheduled
        times = step.times
        parts = [times.schedule, times.build, times.forward + times.wait, times.sample, times.update]
        parts.append(max(0.0, ended - started - sum(parts)))  # text, stop strings, handing over
        self._steps.append(
            {
                "step": self._engine.core.scheduler.stats.num_steps,
                "at": self._moment(started),
                "us": [_micros(seconds) for seconds in parts],
                "tokens": step.plan.num_tokens,
                "said": sum(len(item.drawn) for item in items),
                "num_rows": len(items),
                "rows": [_row(item) for item in items[:MAX_ROWS]],
                "preempted": [request.arrival for request in step.plan.preempted[:MAX_ROWS]],
                "copies": len(step.plan.copies),
            }
        )
        for item in items:
            life = self._lives.get(item.request)
            if life is not None:
                life.scheduled = life.scheduled or started
                if life.first_token is None and item.drawn:
                    life.first_token = ended

    def ended(self, requests: Sequence[Request], at: float) -> None:
        for request in requests:
            life = self._lives.pop(request, None)
            if life is not None:  # else it came before anybody looked
                self._ended.append(self._end(request, life, at))

    def _leave(self) -> None:
        """Nobody has looked for a while. What was recorded would leave a gap when somebody looks again."""
        self._engine.watchers.remove(self)
        self._enlisted = False
        self._steps.clear()
        self._ended.clear()
        self._lives.clear()

    def _end(self, request: Request, life: _Life, at: float) -> dict[str, Any]:
        said, first = len(request.output_token_ids), life.first_token
        return {
            "id": request.arrival,
            "at": self._moment(at),
            "reason": request.finish_reason,
            "prompt": request.num_prompt_tokens,
            "cached": request.num_cached_tokens,
            "output": said,
            "queue_us": None if life.scheduled is None else _micros(life.scheduled - life.arrived),
            "first_token_us": None if first is None else _micros(first - life.arrived),
            "per_token_us": None if first is None or said < 2 else _micros((at - first) / (said - 1)),
            "total_us": _micros(at - life.arrived),
        }

    def _settings(self) -> dict[str, Any]:
        engine = self._engine
        config, cache = engine.config, engine.core.loaded.cache
        return {
            "block_size": config.block_size,
            "block_bytes": config.block_size * KVCache.token_bytes(engine.model_config, cache.dtype),
            "kv_cache_dtype": format_of(cache.dtype).name,
            "max_model_len": engine.inputs.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_prefill_chunk": engine.core.scheduler.max_prefill_chunk,
            "prefix_caching": config.prefix_caching,
            "speculative": config.speculative,
            "policy": config.policy,
        }

    def _pool(self) -> dict[str, Any]:
        """`map` is the pool in order, as runs: what `count` cells are, `count`, and so on. The counts are of blocks."""
        scheduler = self._engine.core.scheduler
        pool = scheduler.pool
        states = bytearray(pool.num_blocks)
        for block in pool.evictable():
            states[block] = CACHED
        for request in scheduler.running:
            for block in request.blocks:
                states[block] = SHARED if states[block] else USED
        per_cell = -(-pool.num_blocks // MAX_CELLS)
        cells = states if per_cell == 1 else bytes(max(states[at : at + per_cell]) for at in range(0, pool.num_blocks, per_cell))
        return {
            "blocks": pool.num_blocks,
            "used": pool.num_used,
            "shared": states.count(SHARED),
            "cached": pool.num_evictable,
            "per_cell": per_cell,
            "map": [number for run in _RUN.finditer(cells) for number in (run[0][0], len(run[0]))],
        }

    def _running(self) -> list[dict[str, Any]]:
        running = self._engine.core.scheduler.running
        share = MAX_LISTED_BLOCKS // max(1, min(len(running), MAX_RUNNING))
        return [{**_request(request), "table": _runs(request.blocks[:share])} for request in running[:MAX_RUNNING]]

    def _moment(self, seconds: float) -> int:
        return _micros(seconds - self._born)


def _request(request: Request) -> dict[str, Any]:
    return {
        "id": request.arrival,
        "name": request.request_id[:80],
        "running": request.status is RequestStatus.RUNNING,
        "prompt": request.num_prompt_tokens,
        "output": len(request.output_token_ids),
        "computed": request.num_computed_tokens,
        "cached": request.num_cached_tokens,
        "limit": request.max_total_tokens,
        "blocks": len(request.blocks),
        "preemptions": request.num_preemptions,
    }


def _row(item: ScheduledRequest) -> list[int]:
    """[request, kind, first position, tokens, drafts among them, drafts that became output]."""
    request, drafts = item.request, len(item.drafts)
    if item.start >= request.num_prompt_tokens and item.num_new_tokens == 1 + drafts:
        kind = DECODE
    else:
        kind = RECOMPUTE if request.num_preemptions else PREFILL
    return [request.arrival, kind, item.start, item.num_new_tokens, drafts, max(0, len(item.drawn) - 1)]


def _runs(blocks: Sequence[int]) -> list[int]:
    """Consecutive numbers as (first, count), flat: 4 5 6 9 -> 4 3 9 1."""
    runs: list[int] = []
    for block in blocks:
        if runs and block == runs[-2] + runs[-1]:
            runs[-1] += 1
        else:
            runs += (block, 1)
    return runs


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)
