"""Who is let in: a bounded queue, a share of it for each API key, and a rate for each key.

A queue without a bound answers everybody too late. So at most `max_num_seqs` sequences run and about `max_queue` wait; whoever
comes then gets 429 at once, before the body is read, with a `retry-after` from how fast sequences have been ending. What counts is
in flight from the first byte to the last: being tokenised, waiting, running, or being read by a slow client.

With several keys, one that sends a flood fills the queue but not the others' share of it: a key may always hold its part
(places / number of keys). The order among those who wait is the scheduler's business: `--policy fair`.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from minfer.server.errors import ApiError
from minfer.server.slot import ModelSlot

# What occupies the engine. Everything else that is posted is only subject to the rate.
QUEUED_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/embeddings"})
QUEUE_FULL, RATE_EXCEEDED = "overloaded", "rate_limit_exceeded"  # the error codes of the two reasons to send somebody away
ANYONE = ""  # the key of those who need none
BURST_SECONDS = 10  # a key that was silent may send so many seconds' worth at once
MOST_SECONDS = 120  # to send a client away for


class Admission:
    """The count of sequences in flight, and each key's allowance. For one event loop; `clock` is in seconds.

    `max_queue` sequences may wait beside those that run (a request that is let in may overshoot with its n); `per_minute`
    requests for each key, None for any number; `keys` is how many keys there are.
    """

    def __init__(self, max_queue: int, per_minute: int | None, keys: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_queue = max_queue
        self.per_minute = per_minute
        self.keys = max(keys, 1)
        self.held: Counter[str] = Counter()  # key -> sequences in flight
        self.refused = dict.fromkeys((QUEUE_FULL, RATE_EXCEEDED), 0)  # 429s so far, by code
        self._clock = clock
        self._ended: deque[float] = deque(maxlen=64)
        self._allowance: dict[str, tuple[float, float]] = {}  # key -> (requests it may send, as of when)

    @property
    def in_flight(self) -> int:
        return self.held.total()

    def charge(self, key: str) -> None:
        """Takes one request off the key's allowance (a token bucket). Raises the 429 that says when there will be one."""
        if self.per_minute is None:
            return
        rate, now = self.per_minute / 60, self._clock()
        most = max(1.0, rate * BURST_SECONDS)
        left, since = self._allowance.get(key, (most, now))
        left = min(most, left + (now - since) * rate)
        if left < 1:
            self._allowance[key] = left, now
            self._refuse(f"this key has sent more than {self.per_minute} requests a minute", (1 - left) / rate, RATE_EXCEEDED)
        self._allowance[key] = left - 1, now

    def enter(self, key: str, seats: int) -> Ticket:
        """A place for one sequence, with `seats` of them running at a time. Raises the 429 of a full queue."""
        places = seats + self.max_queue
        if self.in_flight >= places and self.held[key] >= places // self.keys:
            excess = self.in_flight - places + 1
            waiting = max(self.in_flight - seats, 0)
            self._refuse(
                f"the server is full: {waiting} sequences are waiting, and the limit is {self.max_queue}", self._wait(excess), QUEUE_FULL
            )
        return Ticket(self, key)

    def _wait(self, sequences: int) -> float:
        """Seconds until so many have ended, if they go on ending as they did; the estimate grows while none does."""
        if len(self._ended) < 2:
            return 1.0
        return sequences * (self._clock() - self._ended[0]) / len(self._ended)

    def _refuse(self, why: str, seconds: float, code: str) -> None:
        self.refused[code] += 1
        wait = min(max(math.ceil(seconds), 1), MOST_SECONDS)
        raise ApiError(429, f"{why}; try again in {wait} s", code=code, headers={"retry-after": str(wait)})

    def _leave(self, key: str, sequences: int) -> None:
        self.held[key] -= sequences
        if not self.held[key]:
            del self.held[key]
        self._ended.extend([self._clock()] * sequences)


class Ticket:
    """One request's places. `grow` once its number of sequences is known; `leave` gives all of them back."""

    def __init__(self, admission: Admission, key: str) -> None:
        self.key = key
        self.sequences = 1
        self._admission = admission
        admission.held[key] += 1

    def grow(self, sequences: int) -> None:
        """From now on it holds so many places: it was let in, so this refuses nothing."""
        self._admission.held[self.key] += sequences - self.sequences
        self.sequences = sequences

    def leave(self) -> None:
        self._admission._leave(self.key, self.sequences)
        self.sequences = 0


def take_places(request: Request, sequences: int) -> str:
    """Counts all of a request's sequences in the queue, now that their number is known. Returns the key that sent it."""
    state = request.scope["state"]
    if state.get("ticket") is not None:
        state["ticket"].grow(sequences)
    return str(state.get("key", ANYONE))


class Gate:
    """The admission as ASGI middleware: holds a ticket for as long as the request is anywhere in the server."""

    def __init__(self, app: ASGIApp, admission: Admission, slot: ModelSlot) -> None:
        self.app = app
        self.admission = admission
        self.slot = slot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        llm = self.slot.llm
        if scope["type"] != "http" or scope["method"] != "POST" or llm is None:  # without a model the answer is a 503 anyway
            await self.app(scope, receive, send)
            return
        key = scope["state"].get("key", ANYONE)
        ticket = None
        try:
            self.admission.charge(key)
            if scope["path"] in QUEUED_PATHS:
                ticket = self.admission.enter(key, llm.config.max_num_seqs)
        except ApiError as refusal:
            await refusal.response()(scope, receive, send)
            return
        scope["state"]["ticket"] = ticket
        try:
            await self.app(scope, receive, send)
        finally:
            if ticket is not None:
                ticket.leave()
