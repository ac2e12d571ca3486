"""Unsloth: `FastLanguageModel.for_inference`, its rewritten transformers model; bf16, or 4-bit through bitsandbytes.

Written from its documentation; not yet run on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare.engines.base import EngineInfo, Install, source
from compare.engines.transformers import Transformers
from compare.protocol import LoadOptions

INFO = EngineInfo(
    name="unsloth",
    title="Unsloth",
    url="https://docs.unsloth.ai/basics/running-and-saving-models",
    setting="FastLanguageModel.for_inference, generate(); not yet run on a GPU",
    precisions={"cuda": ("bf16", "int4")},
    batching="static",
    scores=True,
    install={"cuda": (Install(("unsloth",)),)},
    modules=("unsloth",),
    adapter="Unsloth",
)


class Unsloth(Transformers):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import torch  # after unsloth, which patches it
        import unsloth

        self.torch, self.options = torch, options
        loaded, _ = unsloth.FastLanguageModel.from_pretrained(
            str(source(model)), max_seq_length=options.max_context, dtype=torch.bfloat16, load_in_4bit=options.precision == "int4"
        )
        unsloth.FastLanguageModel.for_inference(loaded)
        self.model = loaded
        return {"version": f"unsloth {unsloth.__version__}", "flags": ""}
