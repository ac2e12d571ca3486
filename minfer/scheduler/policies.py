"""Policies (seam 6): in which order requests are admitted, and in the reverse order preempted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from minfer.config import PolicyName
from minfer.errors import ConfigError
from minfer.scheduler.request import Request


class Policy(ABC):
    @abstractmethod
    def key(self, request: Request) -> tuple[int, ...]:
        """Sort key: the smallest runs first and is preempted last. Unique, because it ends in the arrival number."""

    def displaces(self, waiting: Request, running: Request) -> bool:
        """Whether a waiting request may push out a running one when there is no room for both."""
        return False

    # What happens to requests, for policies that keep accounts. `key` must not change while a request waits or runs.
    def arrived(self, request: Request) -> None:  # noqa: B027  most policies need no accounts
        """The request is new, and about to be queued for the first time."""

    def admitted(self, request: Request) -> None:  # noqa: B027
        """It leaves the queue, for the first time or after a preemption."""

    def ended(self, request: Request) -> None:  # noqa: B027
        """It is over, in whatever way; its tokens are final."""


class FirstComeFirstServed(Policy):
    """By arrival. A preempted request keeps its place, so the oldest one always makes progress: no starvation."""

    def key(self, request: Request) -> tuple[int, ...]:
        return (request.arrival,)


class Priority(Policy):
    """By `priority` (lower first), then arrival. Only a strictly more urgent request displaces a running one.

    A steady stream of urgent requests can starve the others: that is what the caller asked for.
    """

    def key(self, request: Request) -> tuple[int, ...]:
        return (request.priority, request.arrival)

    def displaces(self, waiting: Request, running: Request) -> bool:
        return waiting.priority < running.priority


@dataclass
class _Account:
    next_turn: int = 0  # where this tenant's next request stands, if it has not been idle
    owed: int = 0  # tokens used beyond those charged for; negative: charged and not used
    usual_output: int = 64  # tokens, a moving average
    alive: int = 0  # requests that wait or run


class FairShare(Policy):
    """Tenants take turns by tokens, so one that floods the queue waits behind itself. Within a tenant, by arrival.

    Start-time fair queueing (Goyal, Vin, Cheng 1996): a request's turn begins where its tenant's previous one ends, or now,
    where "now" is the turn that was admitted last; the smallest goes first. A turn is as long as the request is expected to
    use tokens: its prompt, without what the prefix cache had, and its tenant's usual output. What it used in the end is
    settled with the next one. Turns don't change once they are given, so a queue of them stays sorted.
    """

    def __init__(self) -> None:
        self._now = 0
        self._accounts: dict[str, _Account] = {}

    def key(self, request: Request) -> tuple[int, ...]:
        return (request.turn, request.arrival)

    def arrived(self, request: Request) -> None:
        account = self._accounts.setdefault(request.tenant, _Account())
        expected = request.num_prompt_tokens + min(account.usual_output, request.max_total_tokens - request.num_prompt_tokens)
        due = expected + account.owed
        account.alive += 1
        request.turn = max(self._now, account.next_turn)
        request.charged = expected
        account.next_turn = request.turn + max(due, 0)
        account.owed = min(due, 0)

    def admitted(self, request: Request) -> None:
        self._now = max(self._now, request.turn)

    def ended(self, request: Request) -> None:
        account = self._accounts[request.tenant]
        output = len(request.output_token_ids)
        used = request.num_tokens - request.num_cached_tokens if output else 0
        account.owed += used - request.charged
        account.alive -= 1
        if not account.alive:  # nobody's place depends on it: what was charged and not used, by requests that were aborted, is given back
            account.next_turn, account.owed = max(self._now, account.next_turn + min(account.owed, 0)), max(account.owed, 0)
        if output:
            account.usual_output += (output - account.usual_output) // 8


_POLICIES: dict[str, type[Policy]] = {"fcfs": FirstComeFirstServed, "priority": Priority, "fair": FairShare}


def create_policy(name: PolicyName) -> Policy:
    if name not in _POLICIES:
        raise ConfigError(f"policy must be one of {', '.join(_POLICIES)}, not {name!r}")
    return _POLICIES[name]()
