"""AutoAWQ: 4-bit AWQ with groups of 32 (128 doesn't divide SmolLM2's 576 columns), fused layers.

Archived upstream; written from its documentation; not yet run on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare.engines.base import EngineInfo, Install
from compare.engines.gptqmodel import own_samples
from compare.engines.transformers import Transformers
from compare.protocol import LoadOptions

INFO = EngineInfo(
    name="autoawq",
    title="AutoAWQ",
    url="https://github.com/casper-hansen/AutoAWQ",
    setting="AWQ int4 GEMM, groups of 32, fused layers; not yet run on a GPU",
    precisions={"cuda": ("int4",)},
    batching="static",
    scores=True,
    install={"cuda": (Install(("torch==2.6.0", "transformers==4.51.3", "autoawq==0.2.9", "accelerate")),)},
    modules=("awq",),
    adapter="AutoAwq",
)


class AutoAwq(Transformers):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        from awq import AutoAWQForCausalLM
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(weights)
        model = AutoAWQForCausalLM.from_pretrained(str(weights))
        config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
        model.quantize(tokenizer, quant_config=config, calib_data=[tokenizer.decode(row) for row in own_samples(weights)])
        model.save_quantized(str(out))
        tokenizer.save_pretrained(out)

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import torch
        from awq import AutoAWQForCausalLM, __version__

        self.torch, self.options = torch, options
        fused = AutoAWQForCausalLM.from_quantized(str(model), fuse_layers=True, max_seq_len=options.max_context)
        self.model = fused.model
        return {"version": f"autoawq {__version__}", "flags": "fused layers"}
