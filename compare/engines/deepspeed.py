"""DeepSpeed: `init_inference` over a transformers model; kernel injection on GPUs, plain modules on a CPU.

On the CPU DeepSpeed compiles its communication library when it is first used, so it needs a C++ compiler.
Setting: https://www.deepspeed.ai/tutorials/inference-tutorial/.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from compare.engines.base import EngineInfo, Install
from compare.engines.transformers import Transformers
from compare.protocol import LoadOptions

INFO = EngineInfo(
    name="deepspeed",
    title="DeepSpeed inference",
    url="https://www.deepspeed.ai/tutorials/inference-tutorial/",
    setting="init_inference over transformers' model, generate(); kernel injection on GPUs only",
    precisions={"cpu": ("bf16",), "cuda": ("bf16", "fp16")},
    batching="static",
    scores=True,
    install={
        "cpu": (Install(("torch==2.13.0", "transformers==5.23.0", "numpy")), Install(("deepspeed==0.19.8",))),
        "cuda": (Install(("torch", "transformers==5.23.0", "accelerate", "deepspeed==0.19.8")),),
    },
    modules=("deepspeed", "transformers"),
    adapter="DeepSpeed",
)


class DeepSpeed(Transformers):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        for name, value in (
            ("RANK", "0"),
            ("LOCAL_RANK", "0"),
            ("WORLD_SIZE", "1"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "29577"),
        ):
            os.environ.setdefault(name, value)
        import deepspeed

        facts = super().load(model, options)
        inject = options.device == "cuda"
        self.model = deepspeed.init_inference(self.model, dtype=self.model.dtype, replace_with_kernel_inject=inject).module
        return {**facts, "version": f"deepspeed {deepspeed.__version__}, {facts['version']}", "flags": f"kernel injection {inject}"}
