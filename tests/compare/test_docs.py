"""Every file that PROTOCOL.md names exists, and so does every engine with an adapter."""

from __future__ import annotations

import re

from compare import engines
from compare.process import ROOT


def test_the_protocol_page_names_real_files() -> None:
    page = (ROOT / "compare" / "PROTOCOL.md").read_text()
    named = set(re.findall(r"`((?:native/|engines/)?\w+\.(?:py|cpp))`", page))
    assert {"protocol.py", "native/ceilings.cpp"} <= named
    for name in named | {f"engines/{name}.py" for name in engines.ADAPTERS}:
        assert (ROOT / "compare" / name).exists(), name
