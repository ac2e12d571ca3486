"""minfer: a compact inference engine for Llama-family models.

    from minfer import LLM, SamplingParams
    LLM("smollm2-135m").generate(["The sky is"], SamplingParams(max_tokens=32))

Names are resolved on first use, so that `import minfer` costs next to nothing on top of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minfer.config import EngineConfig as EngineConfig
    from minfer.engine.async_llm import AsyncLLM as AsyncLLM
    from minfer.engine.llm import LLM as LLM
    from minfer.engine.outputs import CompletionOutput as CompletionOutput
    from minfer.engine.outputs import RequestOutput as RequestOutput
    from minfer.errors import MinferError as MinferError
    from minfer.sampling_params import SamplingParams as SamplingParams
    from minfer.structured_outputs import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "minfer.engine.llm",
    "AsyncLLM": "minfer.engine.async_llm",
    "CompletionOutput": "minfer.engine.outputs",
    "EngineConfig": "minfer.config",
    "MinferError": "minfer.errors",
    "RequestOutput": "minfer.engine.outputs",
    "SamplingParams": "minfer.sampling_params",
    "StructuredOutputsParams": "minfer.structured_outputs",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'minfer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
