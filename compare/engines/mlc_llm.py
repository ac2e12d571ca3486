"""MLC-LLM: its wheels are served from its own index only, so it is installed by hand and measured through `openai`."""

from __future__ import annotations

from compare.engines.base import EngineInfo

INFO = EngineInfo(
    name="mlc-llm",
    title="MLC-LLM",
    url="https://llm.mlc.ai/docs/deploy/rest.html",
    reason="no package on the registry (its wheels are on an index of its own); install it by hand, start `mlc_llm serve` and give the "
    "address: --against openai=http://HOST:PORT/v1",
    server=True,
)
