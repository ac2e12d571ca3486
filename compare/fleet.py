"""The engines of a run, loaded and paused: `use` hands out exactly one that runs, with all others stopped.

Processes are kept between cells so that engines can interleave A B A B without loading each time. They are replaced when a
workload needs other load options, and the one unused longest goes first when memory gets short.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.machine import available_memory, total_memory
from compare.process import EngineProcess
from compare.protocol import LoadOptions

SPARE_BYTES = 5 << 30  # left for what engines allocate as they work, for the system and the page cache; at most a quarter of all


@dataclass(frozen=True)
class Launch:
    """Everything needed to start one contender."""

    label: str
    module: str
    python: Path
    model: Path
    log: Path
    cpus: tuple[int, ...]
    expected_bytes: int
    preload: tuple[Path, ...] = ()


class Fleet:
    """Use as a context manager: leaving it ends every engine."""

    def __init__(self, load_limit: float, say: Callable[[str], None] = lambda _: None) -> None:
        self._limit, self._say = load_limit, say
        self._running: OrderedDict[str, tuple[LoadOptions, EngineProcess]] = OrderedDict()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def use(self, launch: Launch, options: LoadOptions, loaded: Callable[[dict[str, Any]], None]) -> tuple[EngineProcess, bool]:
        """The contender's process, loaded so, and whether it is new. Raises `EngineFailure`."""
        if (entry := self._running.get(launch.label)) is not None:
            if entry[0] == options and entry[1].alive:
                self._running.move_to_end(launch.label)
                return entry[1], False
            self.drop(launch.label)
        self._make_room(launch.expected_bytes)
        process = start(launch)
        try:
            self._say(f"{launch.label}: loading")
            loaded(process.load(launch.model, options, self._limit))
        except BaseException:  # Ctrl-C included: a half-loaded engine must not outlive us
            process.close()
            raise
        self._running[launch.label] = (options, process)
        return process, True

    def drop(self, label: str) -> None:
        entry = self._running.pop(label, None)
        if entry is not None:
            entry[1].close()

    def close(self) -> None:
        for label in list(self._running):
            self.drop(label)

    def _make_room(self, need: int) -> None:
        spare = min(SPARE_BYTES, (total_memory() or 4 * SPARE_BYTES) // 4)
        while self._running:
            free = available_memory()
            if free is None or free > need + spare:
                return
            self.drop(next(iter(self._running)))


def start(launch: Launch) -> EngineProcess:
    env = {"LD_PRELOAD": ":".join(map(str, launch.preload))} if launch.preload else None
    return EngineProcess(launch.module, launch.python, launch.log, cpus=launch.cpus, env=env)
