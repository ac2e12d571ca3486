"""The inside of an engine's subprocess: `python -m compare.worker ENGINE`, in that engine's environment.

Engines print what they like to stdout, so the protocol takes the real one for itself and points file descriptor 1 at stderr,
which the parent keeps as the engine's log. Affinity is set here, before the engine is imported, because thread pools read it
when they are made. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from compare.engines.base import Adapter, Recorder
from compare.protocol import LoadOptions, Request


def take_stdout() -> TextIO:
    """The protocol's own stream; whatever else writes to stdout lands in stderr from now on."""
    mine = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    return mine


def die_with_parent() -> None:
    """Asks Linux to end this process when its parent is gone, even while it is stopped and can't see its stdin close."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() == 1:  # it went before we could ask
            os._exit(1)


def peak_resident_bytes() -> int:
    """High-water mark of this process's memory (VmHWM; `ru_maxrss` where /proc isn't)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class Worker:
    """Answers one op at a time. Each method named like an op takes the message and returns the result."""

    def __init__(self, adapter: type[Adapter]) -> None:
        self.adapter_class = adapter
        self.adapter: Adapter | None = None

    def op_prepare(self, message: dict[str, Any]) -> dict[str, Any]:
        out = Path(message["out"])
        self.adapter_class.prepare(Path(message["weights"]), message["precision"], out)
        return {"bytes": folder_bytes(out)}

    def op_load(self, message: dict[str, Any]) -> dict[str, Any]:
        options = LoadOptions.from_json(message["options"])
        start = time.perf_counter()
        self.adapter = self.adapter_class()
        facts = self.adapter.load(Path(message["model"]), options)
        return {"weight_bytes": folder_bytes(Path(message["model"])), **facts, "load_s": time.perf_counter() - start}

    def op_generate(self, message: dict[str, Any]) -> dict[str, Any]:
        recorder = Recorder([Request(**r) for r in message["requests"]])
        self._loaded().generate(recorder)
        return {"traces": [t.as_json() for t in recorder.traces]}

    def op_score(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"logprobs": self._loaded().score(message["windows"])}

    def op_next_logprobs(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"logprobs": self._loaded().next_logprobs(message["contexts"], message["top"])}

    def op_memory(self, message: dict[str, Any]) -> dict[str, Any]:
        return {"resident": peak_resident_bytes(), "device": self._loaded().device_memory()}

    def _loaded(self) -> Adapter:
        if self.adapter is None:
            raise RuntimeError("the engine is not loaded")
        return self.adapter

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            op: Callable[[dict[str, Any]], dict[str, Any]] = getattr(self, f"op_{message['op']}")
            return {"ok": op(message)}
        except NotImplementedError as error:
            return {"error": {"kind": "unsupported", "message": str(error), "traceback": ""}}
        except Exception as error:  # the engine's own errors are of any type, and each must become a row with a reason
            text = f"{type(error).__name__}: {error}"
            return {"error": {"kind": "error", "message": text, "traceback": traceback.format_exc()}}


def folder_bytes(folder: Path) -> int:
    """Size of the weight files in a folder: links followed, a file that has two names counted once, `source.gguf` left out."""
    seen: dict[tuple[int, int], int] = {}
    for root, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name != "source.gguf" and name.endswith((".safetensors", ".gguf", ".bin", ".onnx", ".data", ".pth", ".pt")):
                stat = (Path(root) / name).stat()
                seen[(stat.st_dev, stat.st_ino)] = stat.st_size
    return sum(seen.values())


def main() -> None:
    engine, cpus = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    die_with_parent()
    out = take_stdout()
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(c) for c in cpus.split(",")})
    module = importlib.import_module(engine if "." in engine else f"compare.engines.{engine}")
    worker = Worker(getattr(module, module.INFO.adapter))
    for line in sys.stdin:
        message = json.loads(line)
        if message["op"] == "exit":
            break
        out.write(json.dumps(worker.answer(message)) + "\n")
        out.flush()
    out.flush()
    os._exit(0)  # some engines hang in their destructors; everything that matters has been said


if __name__ == "__main__":
    main()
