"""Half an hour of a crowd of all kinds: part of `make test-all`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MINUTES = 30


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 900)
def test_half_an_hour_of_everything(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Exactly one ending for each request, gauges back at 0 after each round, and memory that doesn't grow."""
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "compare.load", "mixed", "--minutes", str(MINUTES), "--out", str(out)]
    done = subprocess.run([*command, "--", "--kv-cache-memory", "256M"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["verdict"] == "good"
