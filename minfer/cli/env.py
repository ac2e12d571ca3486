"""`minfer env`: what minfer finds on this machine and would choose; the first thing to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

from minfer import __version__
from minfer.cli.command import command
from minfer.cli.options import engine_flags
from minfer.cli.terminal import Terminal, human_bytes
from minfer.config import EngineConfig

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "gguf",
    "huggingface-hub",
    "jinja2",
    "sentencepiece",
    "fastapi",
    "uvicorn",
    "triton",
)


@command(engine=engine_flags(only=["device", "dtype", "backend", "threads"]))
def env(terminal: Terminal, engine: EngineConfig) -> None:
    """Show versions, the device, and the kernels that would be used."""
    values = describe(engine)
    if terminal.json:
        terminal.result(values)
        return
    rows = [(name, _text(name, value)) for name, value in values.items()]
    terminal.table(rows)


def describe(config: EngineConfig) -> dict[str, Any]:
    import torch

    from minfer.kernels import select_ops
    from minfer.loader import weight_cache
    from minfer.runner.load import pick_device
    from minfer.runner.memory import available_memory

    device = pick_device(config)
    dtype = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
    ops = select_ops(device, dtype, config.backend, config.threads, attention=config.attention_backend)
    cached = weight_cache.entries()
    return {
        "minfer": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "free_memory_bytes": available_memory(device),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "compiled_kernels": compiled_kernels(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "backends": [backend.name for backend in ops.backends],
        "kernels": ops.chosen,
        "quantised_cache": str(weight_cache.cache_root() / "quantised"),
        "quantised_cache_entries": len(cached),
        "quantised_cache_bytes": sum(size for _, size in cached),
    }


def version(package: str) -> str | None:
    """The installed version, or None where the package is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as the system tells it; its architecture where it doesn't."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def compiled_kernels() -> str:
    """The instruction set that the compiled CPU kernels would use, or why there are none."""
    from minfer.kernels.cpu import library

    try:
        return library.choose_isa()
    except library.LibraryMissingError as error:
        return f"none: {error}"


def _text(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item or 'absent'}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return human_bytes(value) if name.endswith("_bytes") else str(value)
