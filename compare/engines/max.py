"""Modular MAX: a compiled engine with a server. Measured through `openai` where it runs; its Python package is only probed here."""

from __future__ import annotations

from compare.engines.base import EngineInfo

INFO = EngineInfo(
    name="max",
    title="Modular MAX",
    url="https://docs.modular.com/max/",
    reason="`pip install modular==26.7.0` fails: ResolutionImpossible, 'max and max[serve]==26.7.0 have conflicting dependencies' "
    "(tried November 2026); where it installs, start `max serve` and give the address: --against openai=http://HOST:PORT/v1",
    server=True,
)
