"""The clocks and ceilings of `minfer.kernels.bench`: a CPU, timed call by call, and a GPU, timed by its own events.

A call of a GPU kernel costs the host some twenty microseconds, more than many kernels take. So a round of calls is captured into a CUDA
graph and replayed: what is timed is the device, as in a captured step. Operands rotate through more memory than its caches hold.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
_COPY_BYTES = 1 << 30
_SIDE = 8192  # of the square matrices whose product finds a peak


class Machine(Protocol):
    device: torch.device
    cache_bytes: int  # operands rotate through at least so much
    decode_rows: int  # larger steps count as one prompt
    rounds_inputs: bool  # whether products with integer codes are integer products

    def describe(self) -> dict[str, Any]: ...

    def ceilings(self) -> dict[str, float]:
        """Bytes a second as `bandwidth`; operations a second of each unit, 0 where there is none."""
        ...

    def free_bytes(self) -> int: ...

    def time(self, calls: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, list[float]]:
        """Microseconds of a call, sorted, for each contender; its calls are the same work on other operands."""
        ...


class CpuMachine:
    """Contenders take turns, so that a noisy neighbour hits all of them."""

    device = torch.device("cpu")
    cache_bytes = 96 * 1024 * 1024
    decode_rows = 64
    rounds_inputs = True

    def __init__(self, threads: int | None) -> None:
        from minfer.kernels.cpu.runtime import Runtime

        self.runtime = Runtime(threads)

    def describe(self) -> dict[str, Any]:
        return {"device": "cpu", "isa": self.runtime.isa, "threads": self.runtime.threads, "load": round(os.getloadavg()[0], 1)}

    def ceilings(self) -> dict[str, float]:
        from minfer.kernels.cpu.roofline import measure

        torch.set_num_threads(self.runtime.threads)  # a table of compiled kernels takes torch's away, but here both compete
        return dict(vars(measure(self.runtime)))

    def free_bytes(self) -> int:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")

    def time(self, calls: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in calls}
        end, turn = time.perf_counter() + seconds, 0
        while time.perf_counter() < end or turn < 5:
            for name, variants in calls.items():
                start = time.perf_counter()
                variants[turn % len(variants)]()
                times[name].append((time.perf_counter() - start) * 1e6)
            turn += 1
        return {name: sorted(values[1:]) for name, values in times.items()}


class GpuMachine:
    device = torch.device("cuda")
    cache_bytes = 256 * 1024 * 1024
    decode_rows = 256
    rounds_inputs = False

    def describe(self) -> dict[str, Any]:
        properties: Any = torch.cuda.get_device_properties(self.device)
        return {"device": properties.name, "processors": properties.multi_processor_count, "torch": torch.__version__}

    def ceilings(self) -> dict[str, float]:
        """What torch's own copy and matrix products reach; `bandwidth` counts what is read and what is written."""
        source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        found = {"bandwidth": 2 * _COPY_BYTES / self._best(lambda: target.copy_(source))}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            a = torch.randn(_SIDE, _SIDE, device=self.device).to(dtype)
            found[str(dtype).removeprefix("torch.")] = 2 * _SIDE**3 / self._best(lambda a=a: a @ a)  # type: ignore[misc]
        codes = torch.randint(-128, 128, (_SIDE, _SIDE), dtype=torch.int8, device=self.device)
        found["int8"] = 2 * _SIDE**3 / self._best(lambda: torch._int_mm(codes, codes.t()))
        found["fp8"] = self._fp8_peak()
        return found

    def _fp8_peak(self) -> float:
        if torch.version.hip is not None or torch.cuda.get_device_capability(self.device) < (8, 9):
            return 0.0
        a = torch.randn(_SIDE, _SIDE, device=self.device).to(torch.float8_e4m3fn)
        one = torch.ones((), device=self.device)
        return 2 * _SIDE**3 / self._best(lambda: torch._scaled_mm(a, a.t(), one, one, out_dtype=torch.bfloat16))

    def _best(self, call: Call) -> float:
        return min(self.time({"": [call]}, 0.1)[""]) / 1e6

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def time(self, calls: Mapping[str, Sequence[Call]], seconds: float) -> dict[str, list[float]]:
        return {name: self._replayed(variants, seconds / len(calls)) for name, variants in calls.items()}

    def _replayed(self, calls: Sequence[Call], seconds: float) -> list[float]:
        for call in calls:  # compiles what has to be compiled, which a capture can't
            call()
        torch.cuda.synchronize(self.device)
        rounds = max(1, -(-16 // len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        graph.replay()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times: list[float] = []
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop or len(times) < 5:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
        return sorted(times)
