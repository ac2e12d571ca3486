"""Optimum-NVIDIA: transformers' interface over TensorRT-LLM engines. Its last release is of January 2025.

Written from its documentation; not yet run on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare.engines.base import EngineInfo, Install, source
from compare.engines.transformers import Transformers
from compare.protocol import LoadOptions

INFO = EngineInfo(
    name="optimum-nvidia",
    title="Optimum-NVIDIA",
    url="https://github.com/huggingface/optimum-nvidia",
    setting="AutoModelForCausalLM of optimum.nvidia, generate(); not yet run on a GPU",
    precisions={"cuda": ("bf16", "fp8")},
    batching="static",
    install={"cuda": (Install(("optimum-nvidia",)),)},
    modules=("optimum.nvidia",),
    adapter="OptimumNvidia",
)


class OptimumNvidia(Transformers):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import torch
        from optimum.nvidia import AutoModelForCausalLM, __version__

        self.torch, self.options = torch, options
        self.model = AutoModelForCausalLM.from_pretrained(source(model), use_fp8=options.precision == "fp8")
        return {"version": f"optimum-nvidia {__version__}", "flags": ""}

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError("optimum-nvidia gives no log-probabilities of a prompt")

    def next_logprobs(self, contexts: list[list[int]], top: int) -> list[dict[int, float]]:
        raise NotImplementedError("optimum-nvidia gives no log-probabilities of the next token")
