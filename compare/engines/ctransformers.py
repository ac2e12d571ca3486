"""ctransformers: GGML bindings whose last release is of September 2023."""

from __future__ import annotations

from compare.engines.base import EngineInfo

INFO = EngineInfo(
    name="ctransformers",
    title="ctransformers",
    url="https://github.com/marella/ctransformers",
    reason="version 0.2.27, the last, installs but loads none of today's GGUF files: RuntimeError: Failed to create LLM 'llama' "
    "(tried with F16 and Q8_0, files of version 3 and 2, with byte-pair and SentencePiece vocabularies)",
)
