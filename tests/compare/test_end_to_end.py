"""`python -m compare` for real: minfer against transformers in this interpreter, and a llama.cpp wheel where one can be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compare.engines import info_of
from compare.environments import find_python, setup
from compare.errors import SetupError
from compare.process import ROOT


def compare(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compare", *arguments]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=500, check=False)


def value(results: dict[str, Any], engine: str, case: str) -> float:
    (cell,) = [c for c in results["cells"] if c["engine"] == engine and c["case"] == case and c["repeat"] == 0]
    assert cell["status"] == "ok", cell["reason"]
    return float(cell["numbers"][cell["metric"]])


@pytest.mark.skipif(sys.platform != "linux", reason="engines are paused and pinned the Linux way")
def test_minfer_against_transformers_and_llamacpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    info, peers = info_of("xllamacpp"), "transformers/bf16,xllamacpp/bf16"
    try:
        if find_python(info, "cpu", here=True) is None:
            setup(info, "cpu")
    except SetupError:  # no registry within reach
        peers = "transformers/bf16"
    out = tmp_path / "run"
    asked = ["--against", peers, "--precision", "bf16", "--workload", "latency,throughput", "--prompts", "3", "--here", "--json"]
    done = compare(*asked, "--scale", "0.05", "--repeats", "1", "--out", str(out), cache=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout)
    for engine in ["minfer/bf16", *peers.split(",")]:
        assert value(results, engine, "latency/batch 1") > 0
        assert value(results, engine, "throughput/offline") > 0
    assert value(results, "transformers/bf16", "gate/agreement") > 0.5
    assert value(results, "minfer/bf16", "gate/agreement") > 0.5, "the same weights must give nearly the same greedy tokens"
    for name in ("results.json", "report.md", "report.html", "traces.jsonl.gz"):
        assert (out / name).stat().st_size > 0

    again = compare(*asked, "--scale", "0.05", "--repeats", "1", "--resume", str(out), cache=tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert [c["at"] for c in json.loads(again.stdout)["cells"]] == [c["at"] for c in results["cells"]], "nothing finished is run again"


def test_the_list_and_mistakes(tmp_path: Path) -> None:
    listed = json.loads(compare("list", "--json", "--device", "cpu", cache=tmp_path).stdout)
    states = {row["name"]: row["state"] for row in listed["engines"]}
    assert states["minfer"] == "runs here"
    assert states["candle"] == "cannot be installed"
    wrong = compare("--against", "no-such-engine", "--model", "tiny", cache=tmp_path)
    assert wrong.returncode == 2
    assert "no engine is called 'no-such-engine'" in wrong.stderr
