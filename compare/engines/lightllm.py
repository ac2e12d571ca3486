"""LightLLM: a server; its package on the registry is a placeholder, so it is built from source and measured through `openai`."""

from __future__ import annotations

from compare.engines.base import EngineInfo

INFO = EngineInfo(
    name="lightllm",
    title="LightLLM",
    url="https://github.com/ModelTC/lightllm",
    reason="needs CUDA; the registry's package (0.0.1) is a placeholder, so install it from source, start its server and give the "
    "address: --against openai=http://HOST:PORT/v1",
    server=True,
)
