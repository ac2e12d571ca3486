"""Modular MAX: a compiled engine behind its own server, so it is measured through `openai`."""

from __future__ import annotations

from compare.engines.base import EngineInfo

INFO = EngineInfo(
    name="max",
    title="Modular MAX",
    url="https://docs.modular.com/max/",
    reason="pip install modular (26.7 needs a recent pip: 23.2 ends in ResolutionImpossible), `max serve --quantization-encoding "
    "float32 --devices cpu` (on a CPU it takes float32 or q4_k only; compiling takes minutes), then --against openai=http://HOST:PORT/v1",
    server=True,
)
