"""The engines compare knows: one adapter file each, and `listed.py` for those that only have a row.

Order is the order of the table.
"""

from __future__ import annotations

import importlib

from compare.engines.base import EngineInfo
from compare.engines.listed import LISTED
from compare.errors import CompareError

ADAPTERS = (
    "minfer",
    "llamacpp",
    "xllamacpp",
    "vllm",
    "transformers",
    "openvino",
    "ctranslate2",
    "onnxruntime",
    "tinygrad",
    "max",
    "litgpt",
    "ctransformers",
    "deepspeed",
    "openai",
    "exllamav2",
    "exllamav3",
    "gptqmodel",
    "autoawq",
    "tensorrt_llm",
    "optimum_nvidia",
    "sglang",
    "lmdeploy",
    "lightllm",
    "unsloth",
    "mlc_llm",
)


def info_of(name: str) -> EngineInfo:
    """The row of one engine. Raises `CompareError` that lists the names."""
    key = name.replace("-", "_").lower()
    if key in ADAPTERS:
        info: EngineInfo = importlib.import_module(f"compare.engines.{key}").INFO
        return info
    for listed in LISTED:
        if listed.name == name.lower():
            return listed
    raise CompareError(f"no engine is called {name!r}; known are {', '.join(i.name for i in all_infos())}")


def all_infos() -> list[EngineInfo]:
    """Every row: engines with an adapter first, then those that stand in the list with a reason."""
    return [info_of(name) for name in ADAPTERS] + list(LISTED)
