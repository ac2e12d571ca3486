"""`minfer doctor`: is this machine ready, and if not, what to do. Each line is a check that was carried out, not a version that was read.

`minfer env` shows what there is; this tries it. A check ends in "ok", in "note" (something could be better) or in "wrong".
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from minfer.cli.command import command
from minfer.cli.terminal import Terminal, human_bytes
from minfer.errors import ConfigError, MinferError

State = Literal["ok", "note", "wrong"]
Finding = tuple[State, str]

EXTRAS = {
    "server": ("fastapi", "uvicorn", "pydantic", "prometheus_client"),
    "chat": ("jinja2",),
    "hub": ("huggingface_hub",),
    "gguf": ("gguf",),
    "guided": ("llguidance",),
}
LITTLE_MEMORY, LITTLE_DISK = 2 << 30, 5 << 30


@command()
def doctor(terminal: Terminal) -> None:
    """Try what minfer needs on this machine, and say what to do about what is wrong. Exit code 2 if something is."""
    findings = [(name, *_run(check)) for name, check in CHECKS.items()]
    wrong = [name for name, state, _ in findings if state == "wrong"]
    if terminal.json:
        terminal.result({"checks": [{"name": n, "state": s, "says": text} for n, s, text in findings], "wrong": wrong})
    else:
        terminal.table([(name, state, text) for name, state, text in findings], ("check", "", ""))
    if wrong:
        raise ConfigError(f"{len(wrong)} of {len(findings)} checks failed: {', '.join(wrong)}")


def _run(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except MinferError as error:
        return "wrong", str(error)
    except Exception as error:  # a check that breaks is what this command is there to find
        return "wrong", f"{type(error).__name__}: {error}"


def _torch() -> Finding:
    import torch

    product = torch.ones(4, 8) @ torch.ones(8, 4)
    return ("ok", f"torch {torch.__version__}") if bool((product == 8).all()) else ("wrong", "torch multiplies wrongly; install it anew")


def _kernels() -> Finding:
    """A small op by the kernels that would be used, against plain torch."""
    import torch

    from minfer.kernels import select_ops

    torch.manual_seed(0)
    x, norm, eps = torch.randn(8, 64), torch.rand(64) + 0.5, 1e-5
    ops = select_ops(torch.device("cpu"), torch.float32, "auto", None)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * norm
    got: Any = ops.rms_norm(x.clone(), norm, eps)
    got = got[0] if isinstance(got, tuple) else got
    if not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
        return (
            "wrong",
            f"the kernels of {ops.backends[0].name} compute something else than torch does; use --backend reference, and tell us",
        )
    if ops.backends[0].name == "reference":
        from minfer.cli.env import compiled_kernels

        return "note", f"no compiled kernels ({compiled_kernels()}): everything runs, slower; install a C++ compiler and minfer again"
    return "ok", f"{ops.backends[0].name}: as torch computes"


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        triton = importlib.util.find_spec("triton") is not None
        name = torch.cuda.get_device_name(0)
        return ("ok", name) if triton else ("note", f'{name}, but no Triton: pip install "minfer[triton]"')
    seen = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()
    if seen:
        return "note", "this machine has a GPU that torch can't use; install a torch built for it, or go on with the CPU"
    return "ok", "none; the CPU is used"


def _memory() -> Finding:
    import torch

    from minfer.runner.memory import available_memory

    free = available_memory(torch.device("cpu"))
    state: State = "ok" if free > LITTLE_MEMORY else "note"
    return state, f"{human_bytes(free)} free" + ("" if state == "ok" else ": enough for small models only; `minfer fit MODEL` tells")


def _disk() -> Finding:
    """Both caches: can they be written to, and is there room?"""
    from minfer.loader.weight_cache import cache_root

    said = []
    for folder in _caches(cache_root()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        said.append((shutil.disk_usage(folder).free, folder))
    free, folder = min(said)
    return ("ok" if free > LITTLE_DISK else "note"), f"{human_bytes(free)} free at {folder}"


def _caches(own: Path) -> Iterator[Path]:
    yield own
    if importlib.util.find_spec("huggingface_hub") is not None:
        import huggingface_hub.constants

        yield Path(huggingface_hub.constants.HF_HUB_CACHE)


def _extras() -> Finding:
    missing = [extra for extra, modules in EXTRAS.items() if any(importlib.util.find_spec(module) is None for module in modules)]
    if missing:
        return "note", f'not installed: {", ".join(missing)}; pip install "minfer[{",".join(missing)}]" adds what they do'
    return "ok", ", ".join(EXTRAS)


def _threads() -> Finding:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) < allowed // 2:
        return "note", f"OMP_NUM_THREADS={given} keeps torch from most of the {allowed} processors"
    return "ok", f"{allowed} processors may be used"


CHECKS: dict[str, Callable[[], Finding]] = {
    "torch": _torch,
    "kernels": _kernels,
    "GPU": _gpu,
    "memory": _memory,
    "disk": _disk,
    "extras": _extras,
    "threads": _threads,
}
