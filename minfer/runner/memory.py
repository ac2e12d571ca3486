"""How much memory there is, and how many KV blocks that makes.

Everything is taken at start, so that a running engine can't run out: the cache is sized from what is free once the weights
are loaded. A cache that can't hold one sequence of the full length is refused at once, with the length that would fit,
instead of failing in the middle of somebody's request.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from minfer.config import EngineConfig
from minfer.errors import CapacityError, ConfigError
from minfer.kvcache import KVCache, format_of
from minfer.model_config import ModelConfig

GIB = 1024**3


def available_memory(device: torch.device) -> int:
    """Free bytes: of the GPU, or what this process may still take of the machine (its cgroup's limit respected)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _meminfo_available()
    limit, used = _cgroup_bytes("memory.max"), _cgroup_bytes("memory.current")
    if limit is not None and used is not None:
        free = min(free, max(limit - used, 0))
    return free


def num_kv_blocks(
    config: EngineConfig, model: ModelConfig, max_len: int, dtype: torch.dtype, device: torch.device, draft: ModelConfig | None = None
) -> int:
    """Blocks for a cache stored as `dtype`: what the budget pays for, but no more than `max_num_seqs` full-length sequences could use.

    A draft model's KV is kept in blocks of the same numbers, so each block costs both. Raises CapacityError if one sequence of
    `max_len` tokens would not fit.
    """
    block_bytes = sum(KVCache.block_bytes(m, config.block_size, dtype) for m in (model, draft) if m is not None)
    budget, origin = _budget(config, device)
    blocks_per_sequence = -(-max_len // config.block_size)
    blocks = min(budget // block_bytes, blocks_per_sequence * config.max_num_seqs)
    if blocks < blocks_per_sequence:
        fits = blocks * config.block_size
        raise CapacityError(
            f"the KV cache has {budget / GIB:.2f} GiB ({origin}), but one sequence of max_model_len={max_len} tokens needs "
            f"{blocks_per_sequence * block_bytes / GIB:.2f} GiB; "
            + (f"set --max-model-len {fits} or less, " if fits else "")
            + ("give the cache more memory" if format_of(dtype).scaled else "store it as --kv-cache-dtype int8, or give it more memory")
        )
    return blocks


def kv_share(config: EngineConfig, device: torch.device) -> float:
    """The share of free memory that the KV cache may take where no number of bytes was asked for."""
    return config.memory_utilization or (0.9 if device.type == "cuda" else 0.5)


def _budget(config: EngineConfig, device: torch.device) -> tuple[int, str]:
    if config.kv_cache_memory is not None:
        free = available_memory(device)
        if config.kv_cache_memory > free:
            raise ConfigError(
                f"kv_cache_memory asks for {config.kv_cache_memory / GIB:.2f} GiB, "
                f"but only {free / GIB:.2f} GiB are free after loading the weights; ask for less"
            )
        return config.kv_cache_memory, "--kv-cache-memory"
    share = kv_share(config, device)
    free = available_memory(device)
    return int(free * share), f"{share:.0%} of the {free / GIB:.2f} GiB free after loading the weights"


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_bytes(name: str) -> int | None:
    """A number from this process's cgroup (version 2), or None where there is none or no limit."""
    try:
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        text = (Path("/sys/fs/cgroup") / group / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
