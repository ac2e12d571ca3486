"""The checkpoints that other tools make of the same folder with the same calibration tokens, for the table of `compare.quantization`.

GPTQModel and llm-compressor, each in an environment of its own that is made when its first row is asked for, on the CPU, with the
settings that its documentation recommends; the group size is the row's. The tokens are handed over as ids, so that all tools see the
very same samples. What a tool prints is kept in a log beside its environment; if it fails, its last words are the row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.engines.base import EngineInfo, Install
from compare.environments import setup
from compare.errors import CompareError
from compare.places import engine_root
from compare.process import last_words

GPTQMODEL = """
import json, sys, torch
from gptqmodel import GPTQModel, QuantizeConfig
weights, samples, out, settings = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3], json.loads(sys.argv[4])
model = GPTQModel.load(weights, QuantizeConfig(device="cpu", **settings))
model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples], batch_size=1)
model.save(out)
"""
LLM_COMPRESSOR = """
import json, sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer
weights, samples, out, settings = sys.argv[1], json.load(open(sys.argv[2])), sys.argv[3], json.loads(sys.argv[4])
if settings["method"] == "gptq":
    from llmcompressor.modifiers.quantization import GPTQModifier as Modifier
else:
    from llmcompressor.modifiers.awq import AWQModifier as Modifier
groups = {"group_0": {"targets": ["Linear"], "weights": settings["weights"]}}
model = AutoModelForCausalLM.from_pretrained(weights, dtype="auto")
oneshot(
    model=model,
    dataset=Dataset.from_dict({"input_ids": samples, "attention_mask": [[1] * len(ids) for ids in samples]}),
    recipe=[Modifier(config_groups=groups, ignore=["lm_head"])],
    max_seq_length=len(samples[0]),
    num_calibration_samples=len(samples),
)
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(weights).save_pretrained(out)
"""


@dataclass(frozen=True)
class Tool:
    info: EngineInfo
    script: str


def _info(name: str, url: str, *install: Install) -> EngineInfo:
    return EngineInfo(name=name, title=name, url=url, precisions={"cpu": ("int4",)}, install={"cpu": install})


TORCH = Install(("torch==2.13.0",))  # this version's wheel is the CPU build; others, as GPTQModel asks for, bring gigabytes of CUDA
TOOLS = {
    "gptqmodel": Tool(
        _info(
            "gptqmodel",
            "https://github.com/ModelCloud/GPTQModel",
            TORCH,
            Install(("gptqmodel==7.7.0",), no_deps=True),
            Install(requirements_of="gptqmodel", without=("torch",)),
        ),
        GPTQMODEL,
    ),
    "llm-compressor": Tool(
        _info("llmcompressor", "https://github.com/vllm-project/llm-compressor", TORCH, Install(("llmcompressor==0.14.0.1",))),
        LLM_COMPRESSOR,
    ),
}


def _weights(group_size: int, symmetric: bool) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": group_size}


# The row's name: the tool, and what its script is told.
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptqmodel, 4 bits, groups of 32": ("gptqmodel", {"bits": 4, "group_size": 32}),
    "gptqmodel, 4 bits, groups of 64": ("gptqmodel", {"bits": 4, "group_size": 64}),
    "llm-compressor GPTQ, 4 bits, groups of 32": ("llm-compressor", {"method": "gptq", "weights": _weights(32, True)}),
    "llm-compressor GPTQ, 4 bits, groups of 64": ("llm-compressor", {"method": "gptq", "weights": _weights(64, True)}),
    "llm-compressor AWQ, 4 bits, groups of 64, zero points": ("llm-compressor", {"method": "awq", "weights": _weights(64, False)}),
}


def make_peer(name: str, weights: Path, samples: Path, out: Path) -> None:
    """Quantises `weights` into the folder `out`. samples: a JSON file of lists of token ids.

    Raises CompareError with the tool's last words.
    """
    tool, settings = PEERS[name]
    info = TOOLS[tool].info
    python = setup(info, "cpu", lambda text: print(text, file=sys.stderr))
    log = engine_root(info.name) / "quantize.log"
    command = [str(python), "-c", TOOLS[tool].script, str(weights), str(samples), str(out), json.dumps(settings)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["GPTQMODEL_CPU_WORKERS"] = "2"  # by its own count it gives a machine of two cores fewer than it then asks for
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=log.parent, check=False).returncode
    if code:
        raise CompareError(f"{name} could not be made: {last_words(log)}")
