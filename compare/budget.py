"""How long a comparison may take, and which repeats are given up so that it does.

Three rules, none of which ever drops an engine or a case: the first repeat is always run. What is given up stands in the
report (the number of repeats beside every figure, and the run's notes).

    per case   an engine's repeats of one case stop when one more would bring them above `case_s` seconds altogether
    per run    a workload may use its even share of the time that is left; what it doesn't use goes to those after it
    in rounds  a further repeat is begun for every engine or for none, so pairs of repeats stay complete

Pure arithmetic over seconds that were measured: no thread, no timer, nothing is cut off in its middle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Budget:
    """total_s: for the whole run, 0 for no limit. case_s: for one engine's repeats of one case, 0 for no limit."""

    total_s: float = 0.0
    case_s: float = 0.0
    clock: Callable[[], float] = time.monotonic
    _end: float = field(init=False)
    _share_ends: float = field(init=False)

    def __post_init__(self) -> None:
        self._end = self._share_ends = self.clock() + self.total_s

    def begin(self, workloads_left: int) -> None:
        """A workload begins; `workloads_left` counts it."""
        now = self.clock()
        self._share_ends = now + max(0.0, self._end - now) / workloads_left

    def round_fits(self, seconds: float) -> bool:
        """Whether another repeat of the workload, which should take `seconds`, still fits its share."""
        return not self.total_s or self.clock() + seconds <= self._share_ends

    def case_fits(self, taken: Sequence[float]) -> bool:
        """Whether an engine that took `taken` seconds for its repeats of a case so far gets another."""
        return not self.case_s or not taken or sum(taken) + taken[-1] <= self.case_s
