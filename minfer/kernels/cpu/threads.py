"""How many threads are worth starting: the physical cores that this process may really use.

Two threads on one core share its vector units and its cache, so for kernels that saturate either they only get in each
other's way. A container's quota counts too: eight threads under a quota of two cores spend most of their time stopped,
and always at a barrier.
"""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_TOPOLOGY = Path("/sys/devices/system/cpu")


def available_cores() -> int:
    """Physical cores in the affinity mask, capped by the cgroup's CPU quota; at least 1."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = len({_siblings(cpu) for cpu in allowed})
    quota = _quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def _siblings(cpu: int) -> str:
    """A name for the physical core of a logical CPU: the list of its hardware threads."""
    path = _TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> float | None:
    """Cores' worth of time per period that the control group grants (v2, then v1), or None where there is no limit."""
    for folder in _cgroup_folders():
        try:
            limit, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if limit != "max":
            return int(limit) / int(period)
    try:
        limit_us = int((_CGROUP / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((_CGROUP / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return limit_us / period_us if limit_us > 0 else None


def _cgroup_folders() -> list[Path]:
    """This process's group and its parents, innermost first: a quota on any of them binds."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    inner = next((line.split("::", 1)[1] for line in lines if line.startswith("0::")), "/")
    folder = _CGROUP / inner.strip("/")
    return [folder, *[parent for parent in folder.parents if parent.is_relative_to(_CGROUP)]]
