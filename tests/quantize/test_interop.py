"""Other engines read what `minfer quantize` writes: transformers with compressed-tensors, from the environment that compare sets up."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from compare.environments import venv_python
from compare.interop import ours, theirs
from minfer.loader import ModelSource, open_checkpoint
from minfer.quantize import Recipe, quantize_model

PYTHON = venv_python("vllm")


@pytest.mark.slow
def test_transformers_says_the_same_from_a_w4a16_checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    check = [PYTHON, "-c", "import transformers, compressed_tensors"]
    if not PYTHON.exists() or subprocess.run(check, capture_output=True, check=False).returncode:
        pytest.skip("no environment with transformers and compressed-tensors; `python -m compare setup vllm` makes one")
    folder = make_checkpoint("llama", hidden_size=64, intermediate_size=192)
    source = open_checkpoint(ModelSource(kind="folder", name=str(folder), path=folder))
    quantize_model(source, Recipe(method="rtn", group_size=32), tmp_path / "out")
    prompts = [[5, 6, 7], [100, 200, 300, 400]]
    assert theirs("transformers", PYTHON, tmp_path / "out", prompts, 8, "float32") == ours(tmp_path / "out", prompts, 8, "float32")
