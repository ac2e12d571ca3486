"""tinygrad: the Transformer of its own `tinygrad.llm`, from an F16 GGUF, through its C backend; one sequence.

It needs clang at run time (its CPU backend compiles every kernel with it). Setting: `python -m tinygrad.llm` uses the same
class with its defaults (https://github.com/tinygrad/tinygrad).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Install, Recorder, finished, run_one_by_one
from compare.gguf_export import write_gguf
from compare.protocol import LoadOptions, Request

INFO = EngineInfo(
    name="tinygrad",
    title="tinygrad",
    url="https://github.com/tinygrad/tinygrad",
    setting="tinygrad.llm's Transformer with JIT, chunks of 32 prompt tokens, as its own command line runs it",
    precisions={"cpu": ("fp16",), "cuda": ("fp16",)},
    install={"any": (Install(("tinygrad==0.13.0", "numpy", "gguf==0.19.0")),)},
    modules=("tinygrad", "gguf"),
    adapter="Tinygrad",
    min_python=(3, 11),
)


class Tinygrad(Adapter):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        write_gguf(weights, out / "model.gguf", "F16", vocabulary=True)

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        if options.device == "cpu" and shutil.which("clang") is None:
            raise RuntimeError("tinygrad's CPU backend compiles with clang, which is not on the PATH")
        os.environ.setdefault("CPU_COUNT", str(options.threads))
        from importlib.metadata import version

        from tinygrad import Device
        from tinygrad.llm.model import Transformer

        self.options = options
        self.model, _ = Transformer.from_gguf(model / "model.gguf", max_context=options.max_context)
        return {"version": f"tinygrad {version('tinygrad')}", "flags": f"device {Device.DEFAULT}"}

    def generate(self, recorder: Recorder) -> None:
        run_one_by_one(recorder, lambda index, request: self._one(recorder, index, request))

    def _one(self, recorder: Recorder, index: int, request: Request) -> None:
        self.model._cached_tokens = []  # its prefix cache can't be switched off, only emptied
        for count, token in enumerate(self.model.generate(list(request.token_ids)), 1):
            recorder.token(index, token)
            if finished(request, self.options, token, count):
                break
