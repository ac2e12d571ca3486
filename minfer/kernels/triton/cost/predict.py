"""From what a warp does to what a launch takes: how many programs fit a processor, how long each is there, how the grid is spread.

    resident   programs on a processor at once: the least of what registers, shared memory, warps and the grid allow
    program    code before the loops, then turns x the cycles of a turn among that many others, then the code after them
    launch     programs are handed out in their order to whichever place is free first; the last to end ends the launch

The floor that a prediction is held against: the bytes that have to move at a rate that a plain streaming read reaches on that device, or
the operations at the matrix units' peak on paper, whichever takes longer.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minfer.kernels.triton.cost.code import Instruction
from minfer.kernels.triton.cost.devices import Device
from minfer.kernels.triton.cost.warp import Run, Share, simulate

_SATURATED = 0.7  # from here on a pipe that is in use is what binds


@dataclass(frozen=True)
class Code:
    """A compiled kernel: what it occupies, and its instructions, cut at the loops where it spends its time."""

    registers: int
    spills: int
    shared: int
    warps: int
    before: Sequence[Instruction]
    loops: Sequence[Sequence[Instruction]]
    after: Sequence[Instruction]


@dataclass(frozen=True)
class Work:
    """What one launch has to do. `turns`: of each program that has work, in the grid's order, how often it runs each loop.

    Where a program has more entries than the code has loops (a compiler made one of two), they are added up.
    """

    turns: Sequence[tuple[int, ...]]
    bytes: int  # that have to move at least once
    cold: float = 1.0  # share of what the programs load that must come from memory
    operations: int = 0
    unit: str = "bf16"
    searches: int = 0  # loads that depend on one another, before the loops
    weights: int = 0  # that a program multiplies by in a turn
    near: float = 0.0  # share that no L2 is asked for: it is in the processor's own cache, or a warp's lanes ask for the same


@dataclass(frozen=True)
class Prediction:
    seconds: float
    floor: float  # seconds
    resident: int
    programs: int
    bound: str
    busy: dict[str, float]  # of the loop that takes longest
    turn: float  # its cycles

    @property
    def share(self) -> float:
        return self.floor / self.seconds

    def row(self) -> dict[str, Any]:
        return {
            "predicted_us": round(1e6 * self.seconds, 2),
            "floor_us": round(1e6 * self.floor, 2),
            "share": round(self.share, 3),
            "bound": self.bound,
            "programs": self.programs,
            "resident": self.resident,
            "turn_cycles": round(self.turn),
            "busy": {name: round(value, 2) for name, value in sorted(self.busy.items(), key=lambda item: -item[1]) if value >= 0.05},
        }


def floor(device: Device, moved: int, operations: int, unit: str) -> float:
    """Seconds that nothing can beat."""
    return max(moved / device.read_bandwidth, operations / device.peak(unit))


def occupancy(code: Code, device: Device) -> int:
    """Programs that fit a processor."""
    registers = -(-code.registers // device.register_unit) * device.register_unit * device.lanes * code.warps
    fits = [device.max_programs, device.max_warps // code.warps, device.registers // registers]
    if code.shared:
        fits.append(device.shared // (code.shared + device.shared_reserved))
    return min(fits)


def predict(code: Code, work: Work, device: Device) -> Prediction:
    """Raises ValueError for a kernel of which not one program fits."""
    fitting, programs = occupancy(code, device), len(work.turns)
    if not fitting:
        raise ValueError(f"a program of {code.warps} warps, {code.registers} registers, {code.shared} bytes doesn't fit {device.name}")
    resident = max(1, min(fitting, -(-programs // device.processors)))
    lengths = Counter(_fold(turns, len(code.loops)) for turns in work.turns)
    crowd = _crowd(code, work, device, resident, programs)
    cycles = {turns: crowd.around + sum(n * run.turn for n, run in zip(turns, crowd.runs, strict=True)) for turns in lengths}
    each = [cycles[_fold(turns, len(code.loops))] for turns in work.turns]
    begun, rest, busy = _spread(each, min(programs, device.processors * resident))
    spent = [sum(turns[n] * count for turns, count in lengths.items()) * run.turn for n, run in enumerate(crowd.runs)]
    main = crowd.runs[spent.index(max(spent))] if crowd.runs else crowd.alone
    thin = max(1, min(resident, -(-busy // device.processors)))
    if thin < resident:  # what is left when no program waits any more is done in less of a crowd
        rest *= _crowd(code, work, device, thin, busy).pace(code, spent) / crowd.pace(code, spent)
    seconds = device.launch + (begun + rest) / device.clock
    least = floor(device, work.bytes, work.operations, work.unit)
    return Prediction(seconds, least, resident, programs, _bound(main.busy, programs, device), main.busy, main.turn)


@dataclass(frozen=True)
class _Crowd:
    """`runs` of the loops, and the cycles `around` them, with so many programs on a processor. `alone`: a kernel without loops."""

    runs: Sequence[Run]
    around: float
    alone: Run

    def pace(self, code: Code, spent: Sequence[float]) -> float:
        return self.runs[spent.index(max(spent))].turn if code.loops else self.around


def _crowd(code: Code, work: Work, device: Device, resident: int, programs: int) -> _Crowd:
    quarters = min(4, resident * code.warps)
    warps = -(-resident * code.warps // 4)
    # The memory serves whoever asks: a processor with more programs than others gets more of it, as far as its port carries that.
    parts = max(1.0, min(programs, device.processors * resident) / resident) * quarters
    port = device.l2_port / quarters
    memory, l2 = (min(port, rate / device.clock / parts) for rate in (device.read_bandwidth, device.l2_bandwidth))
    share = Share(memory, l2, work.cold, work.near)
    # What stands before a loop was just written, and small; where there is no loop, a compiler may have written its turns out.
    outside = Share(share.memory, share.l2, 0.0) if code.loops else share
    before = simulate(code.before, device, outside, warps, 1)
    around = before.cycles + simulate(code.after, device, outside, warps, 1).cycles + work.searches * device.l2_latency
    return _Crowd([simulate(loop, device, share, warps) for loop in code.loops], around, before)


def _fold(turns: tuple[int, ...], loops: int) -> tuple[int, ...]:
    if len(turns) <= loops:
        return (0,) * (loops - len(turns)) + turns
    return (sum(turns[: len(turns) - loops + 1]), *turns[len(turns) - loops + 1 :]) if loops else ()


def _spread(lengths: Sequence[float], places: int) -> tuple[float, float, int]:
    """Each program taken by the place that is free first: when the last one starts, how long it takes from then until all have
    ended, and how many places work in that time, on average.
    """
    free = [0.0] * places
    begun = 0.0
    for length in lengths:
        begun = free[0]
        heapq.heapreplace(free, begun + length)
    rest = max(free) - begun
    return begun, rest, round(sum(max(0.0, end - begun) for end in free) / rest) if rest else places


def _bound(busy: dict[str, float], programs: int, device: Device) -> str:
    name, most = max(((n, value) for n, value in busy.items() if n not in ("other", "memory")), key=lambda item: item[1])
    if most >= _SATURATED:
        return {"dram": "memory", "l2": "L2", "fma": "float pipe", "alu": "integer pipe", "shared": "shared memory"}.get(name, name)
    return "latency" if programs >= device.processors else "latency, few programs"
