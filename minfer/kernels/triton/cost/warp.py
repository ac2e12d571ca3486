"""A quarter of a processor, cycle by cycle: one scheduler, its share of the pipes and of the memory, and the warps that live there.

A warp issues in order. An instruction goes out when the registers it reads have been written, its pipe is free, and (NVIDIA) no other
warp issues in that cycle; on AMD a SIMD gives every wave a turn each four cycles, and waits are written down in the code. What is
loaded comes at the later of two times: after the latency, and when the memory has carried all that was asked for before.

    warp 0   LDG......................HMMA.HMMA.FMUL...           the more warps, the more of the gaps are filled,
    warp 1    LDG......................    HMMA.HMMA...           until some pipe, or the memory, is never idle

The warps of a program share its barriers; as all do the same work, a barrier is taken to cost a warp the same wherever the others are.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from minfer.kernels.triton.cost.code import Instruction, half_rate
from minfer.kernels.triton.cost.devices import Device

_EIGHT_BITS = ("IMMA", "IGMMA", "QMMA", "QGMMA", "v_mfma_i32", "v_mfma_f32_16x16x32_fp8", "v_mfma_f32_32x32x16_fp8")  # at twice the rate
_BARRIER = 20  # cycles
_LATENCY = {"fma": 5, "alu": 6, "special": 20, "matrix": 25}  # NVIDIA; of matrix units beyond the cycles they are busy
_AMD_LATENCY = {"fma": 4, "alu": 4, "special": 16, "matrix": 8}
_NARROW = 128  # bytes that a warp moves at most where a thread loads less than half of what others do: an index, a scale


@dataclass(frozen=True)
class Share:
    """What this quarter gets of the device: bytes a cycle, and how much of what is loaded has to come from memory, and how much not even
    from L2."""

    memory: float
    l2: float
    cold: float
    near: float = 0.0


@dataclass(frozen=True)
class Run:
    """`turn`: cycles from one turn to the next, once they follow evenly. `busy`: share of those that each pipe is in use."""

    cycles: float
    turn: float
    busy: dict[str, float]


class _Warp:
    __slots__ = ("at", "copies", "groups", "matrix", "memory", "next", "ready", "shared", "stored", "turn")

    def __init__(self) -> None:
        self.at = 0  # the next instruction
        self.turn = 0
        self.next = 0.0  # its earliest cycle
        self.ready: dict[str, float] = {}
        self.copies: list[float] = []  # of the open group
        self.groups: list[float] = []
        self.memory: list[float] = []
        self.shared: list[float] = []
        self.matrix: list[float] = []
        self.stored = 0.0


def simulate(code: Sequence[Instruction], device: Device, share: Share, warps: int, turns: int = 8) -> Run:
    """`warps` of them run `code` `turns` times over, all beginning together."""
    if not code:
        return Run(0.0, 0.0, {})
    widest = max((i.bytes for i in code if i.pipe == "memory"), default=0)
    free: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    state = [_Warp() for _ in range(warps)]
    ends = [0.0] * turns
    queue = [(0.0, n, n) for n in range(warps)]
    order = warps  # among warps that could go in the same cycle, the one that has waited longest does
    while queue:
        asked, turn_of, number = heapq.heappop(queue)
        warp = state[number]
        instruction = code[warp.at]
        now = max(warp.next, _allowed(instruction, warp), free[instruction.pipe])
        if device.nvidia:
            now = max(now, free["issue"])
        if now > asked:
            heapq.heappush(queue, (now, turn_of, number))
            continue
        order += 1
        _issue(instruction, warp, now, device, share, free, busy, widest)
        warp.at += 1
        if warp.at == len(code):
            ends[warp.turn] = max(ends[warp.turn], warp.next)
            warp.at, warp.turn = 0, warp.turn + 1
        if warp.turn < turns:
            heapq.heappush(queue, (warp.next, order, number))
    total = max(ends[-1], *(t for warp in state for t in (*warp.ready.values(), warp.next)))
    first = turns // 2
    turn = (ends[-1] - ends[first - 1]) / (turns - first) if turns > 1 else total
    return Run(total, turn, {pipe: min(1.0, used / turns / turn) for pipe, used in busy.items()} if turn else {})


def _allowed(instruction: Instruction, warp: _Warp) -> float:
    """The cycle from which what it waits for is there."""
    ready = warp.ready
    at = max((ready.get(register, 0.0) for register in instruction.reads), default=0.0)
    for kind, left in instruction.waits.items():
        pending = {"copies": warp.groups, "memory": warp.memory, "shared": warp.shared, "matrix": warp.matrix}[kind]
        at = max(at, max(pending[: len(pending) - left], default=0.0))
    return max(at, warp.stored) + _BARRIER if instruction.barrier else at


def _issue(
    instruction: Instruction, warp: _Warp, now: float, device: Device, share: Share, free: Counter[str], busy: Counter[str], widest: int
) -> None:
    pipe = instruction.pipe
    turn = _occupied(instruction, device)
    free[pipe] = now + turn  # type: ignore[assignment]
    busy[pipe] += turn  # type: ignore[assignment]
    if device.nvidia:
        free["issue"] = now + 1  # type: ignore[assignment]
        busy["issue"] += 1
    warp.next = now + (1 if device.nvidia else 4)
    done = now + (_LATENCY if device.nvidia else _AMD_LATENCY).get(pipe, turn)
    if pipe == "matrix":
        done += turn
        if instruction.bytes:
            busy["shared"] += instruction.bytes * device.lanes / 32  # type: ignore[assignment]
        warp.matrix.append(done)
    elif pipe == "shared":
        done = now + turn + device.shared_latency
        warp.shared.append(done)
        if instruction.store:
            warp.stored = max(warp.stored, done)
    elif pipe == "memory":
        done = _moved(instruction, now, device, share, free, busy, widest)
        if instruction.asynchronous:
            warp.copies.append(done)
        elif not (instruction.store and device.nvidia):
            warp.memory.append(done)
    if instruction.commits:
        warp.groups.append(max(warp.copies, default=now))
        warp.copies = []
    for register in instruction.writes:
        warp.ready[register] = done


def _occupied(instruction: Instruction, device: Device) -> float:
    """Cycles of its pipe's share that a warp's instruction takes."""
    lanes, pipe = device.lanes, instruction.pipe
    if pipe == "shared":
        return max(4.0, instruction.bytes * lanes / 32)  # a processor moves 128 bytes a cycle, or one request
    if pipe == "matrix":
        rate = device.matrix["int8" if instruction.text.startswith(_EIGHT_BITS) else "bf16"] / 4
        rate *= device.legacy_matrix if instruction.legacy else 1.0
        return max(instruction.operations / rate, instruction.bytes * lanes / 32)
    if not device.nvidia:
        return {"special": 16.0, "memory": 16.0}.get(pipe, 4.0)
    return {"alu": 2.0, "special": 8.0, "memory": 4.0, "fma": 2.0 if half_rate(instruction) else 1.0}.get(pipe, 1.0)


def _moved(
    instruction: Instruction, now: float, device: Device, share: Share, free: Counter[str], busy: Counter[str], widest: int
) -> float:
    moved, cold = instruction.bytes * device.lanes, share.cold
    asked = 1 - share.near
    if instruction.bytes * 2 < widest:
        moved, cold, asked = min(moved, _NARROW), 0.0, 1.0
    for server, rate, amount in (("l2", share.l2, moved * asked), ("dram", share.memory, moved * cold)):
        free[server] = max(free[server], now) + amount / rate  # type: ignore[assignment]
        busy[server] += amount / rate  # type: ignore[assignment]
    arrived = max(free["l2"], free["dram"] if cold else 0.0)
    return arrived + cold * device.memory_latency + (1 - cold) * device.l2_latency
