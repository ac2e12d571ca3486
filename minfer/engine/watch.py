"""`Watcher`: whoever looks on while the engine works. Metrics, a trace and a live view see the same three events.

    added     requests have entered the queue
    stepped   a step is over, and its tokens have been told
    ended     requests are over, for whatever reason; each of them exactly once

All are called in the engine's thread, between steps: the requests may be read without a lock, but nothing may be kept of them
that another thread reads, and what takes long delays everybody's next token. A watcher that raises is dismissed with a line in the log:
looking on must never harm what is looked at.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from minfer.engine.core import CoreStep
from minfer.scheduler import Request

logger = logging.getLogger("minfer.engine")


class Watcher:
    """Every event does nothing until a subclass says what. Moments are seconds of `time.monotonic()`."""

    def added(self, requests: Sequence[Request], arrived: float) -> None:
        """The `n` sequences of one request. `arrived` is when its caller asked, before tokenising and waiting for the engine."""

    def stepped(self, step: CoreStep, started: float, ended: float) -> None:
        """`step.plan` says what was decided and, item by item, which tokens came of it; `step.times` where the time went."""

    def ended(self, requests: Sequence[Request], at: float) -> None:
        """Their `finish_reason` is set, and their blocks are free."""


class Watchers:
    """All watchers of one engine."""

    def __init__(self) -> None:
        self._all: list[Watcher] = []

    def __len__(self) -> int:
        return len(self._all)

    def add(self, watcher: Watcher) -> None:
        """From any thread; it sees what happens from now on."""
        self._all = [*self._all, watcher]

    def remove(self, watcher: Watcher) -> None:
        """From any thread. Unknown ones are ignored."""
        self._all = [other for other in self._all if other is not watcher]

    def tell(self, event: Callable[[Watcher], None]) -> None:
        for watcher in self._all:
            try:
                event(watcher)
            except Exception:
                logger.exception("%s failed, and is not told of anything any more", type(watcher).__name__)
                self.remove(watcher)
