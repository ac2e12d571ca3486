"""Policies (seam 6): in which order requests are admitted, and in the reverse order preempted."""

from __future__ import annotations

from abc import ABC, abstractmethod

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


_POLICIES: dict[str, type[Policy]] = {"fcfs": FirstComeFirstServed, "priority": Priority}


def create_policy(name: PolicyName) -> Policy:
    if name not in _POLICIES:
        raise ConfigError(f"policy must be one of {', '.join(_POLICIES)}, not {name!r}")
    return _POLICIES[name]()
