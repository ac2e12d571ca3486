"""Which machine this is, whether it is quiet, and what it can do at most."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare.places import cache_root

BUSY = 0.10  # above this share of other people's work a timing is not to be trusted


def describe() -> dict[str, Any]:
    """What the report says about the machine. Values that can't be read are left out."""
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": physical_cpus() and len(physical_cpus()),
        "logical_cpus": os.cpu_count(),
        "memory_bytes": total_memory(),
        "cpu_flags": _interesting_flags(),
    }
    if gpus := gpu_names():
        facts["gpus"] = gpus
    return {k: v for k, v in facts.items() if v not in (None, [], "")}


def detect_device() -> str:
    return "cuda" if gpu_names() else "cpu"


def gpu_names() -> list[str]:
    """Name, memory and driver of every NVIDIA GPU, from nvidia-smi; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    return result.stdout.strip().splitlines() if result.returncode == 0 else []


def physical_cpus() -> list[int]:
    """One logical CPU for each physical core that this process may use: the ones engines are pinned to."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    seen: set[str] = set()
    chosen = []
    for cpu in allowed:
        siblings = _read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu)
        if siblings not in seen:
            seen.add(siblings)
            chosen.append(cpu)
    return chosen


def total_memory() -> int | None:
    return _meminfo("MemTotal")


def available_memory() -> int | None:
    return _meminfo("MemAvailable")


def busy_share(seconds: float = 0.25, cpus: Sequence[int] = ()) -> float | None:
    """Share of the CPUs' time spent on anything during the next moment; ours are paused, so it is others' work."""
    before = _cpu_times()
    if before is None:
        return None
    time.sleep(seconds)
    after = _cpu_times()
    if after is None:
        return None
    total, idle = after[0] - before[0], after[1] - before[1]
    return max(0.0, 1.0 - idle / total) if total else 0.0


def ceilings(threads: int, device: str) -> dict[str, float]:
    """Bytes and operations a second, measured now; empty where they can't be (no C++ compiler, no torch for the GPU)."""
    return _cuda_ceilings() if device == "cuda" else _cpu_ceilings(threads)


def _cpu_ceilings(threads: int) -> dict[str, float]:
    source = Path(__file__).parent / "native" / "ceilings.cpp"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return {}
    name = hashlib.sha256(source.read_bytes() + _cpu_model().encode()).hexdigest()[:12]
    binary = cache_root() / f"ceilings-{name}"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        command = [compiler, "-O3", "-march=native", "-std=c++17", "-pthread", str(source), "-o", str(binary)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return {}
    output = subprocess.run([str(binary), str(threads)], capture_output=True, text=True, check=False).stdout
    return {name: float(value) for name, value in (line.split() for line in output.splitlines())}


def _cuda_ceilings() -> dict[str, float]:
    """Copy bandwidth (read + write) and bf16 matrix multiplication, through torch; best of ten."""
    import torch

    cuda: Any = torch.cuda
    if not torch.cuda.is_available():
        return {}

    def best(work: Any) -> float:
        times: list[float] = []
        for _ in range(10):
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return min(times)

    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(block)
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return {
        "read_bytes_per_s": 2 * block.numel() / best(lambda: target.copy_(block)),
        "bf16_ops_per_s": 2 * 8192**3 / best(lambda: square @ square),
    }


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _interesting_flags() -> list[str]:
    wanted = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16")
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            have = set(line.split())
            return [flag for flag in wanted if flag in have]
    return []


def _meminfo(name: str) -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return None


def _cpu_times() -> tuple[float, float] | None:
    """Total and idle jiffies of all CPUs."""
    first = _read("/proc/stat").splitlines()[:1]
    if not first:
        return None
    values = [float(v) for v in first[0].split()[1:]]
    return sum(values[:8]), values[3] + values[4]


def _read(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text()
    return ""
