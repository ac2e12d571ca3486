"""GPTQModel, AutoGPTQ's successor: 4-bit GPTQ with groups of 32, calibrated on the model's own greedy samples.

Written from its documentation; not yet run on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compare.engines.base import EngineInfo, Install
from compare.engines.transformers import Transformers
from compare.protocol import LoadOptions

INFO = EngineInfo(
    name="gptqmodel",
    title="GPTQModel (AutoGPTQ's successor)",
    url="https://github.com/ModelCloud/GPTQModel",
    setting="GPTQ int4, groups of 32, its automatic choice of kernel (Marlin where it fits); not yet run on a GPU",
    precisions={"cuda": ("int4",)},
    batching="static",
    scores=True,
    install={"cuda": (Install(("torch", "numpy")), Install(("gptqmodel", "accelerate")))},
    modules=("gptqmodel",),
    adapter="GptqModel",
)
CALIBRATION_PROMPTS, CALIBRATION_TOKENS = 64, 256


def own_samples(weights: Path) -> list[list[int]]:
    """Token ids that the model itself writes, sampled with a fixed seed: calibration text without anyone's data set."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16).to("cuda")
    start = torch.randint(256, model.config.vocab_size, (CALIBRATION_PROMPTS, 1), device="cuda")
    rows: list[list[int]] = model.generate(start, max_new_tokens=CALIBRATION_TOKENS, do_sample=True).tolist()
    return rows


class GptqModel(Transformers):
    info = INFO

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        from gptqmodel import GPTQModel, QuantizeConfig

        rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in own_samples(weights)]
        model = GPTQModel.load(str(weights), QuantizeConfig(bits=4, group_size=32))
        model.quantize(rows, batch_size=4)
        model.save(str(out))

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        import gptqmodel
        import torch

        self.torch, self.options = torch, options
        self.model = gptqmodel.GPTQModel.load(str(model), device="cuda:0").model
        self.model.generation_config.pad_token_id = 0
        return {"version": f"gptqmodel {gptqmodel.__version__}", "flags": ""}
