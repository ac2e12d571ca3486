"""`make gpu` on a machine without a GPU: it says so, its stages run where little is installed; one that dies costs itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compare import gpu, gpu_stages

ROOT = Path(__file__).parents[2]
# What the machine with the GPU may lack. transformers brings huggingface_hub, typer and others along, so its stage isn't under this.
ABSENT = ("typer", "click", "rich", "jinja2", "gguf", "huggingface_hub", "fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client",
          "httpx", "llguidance", "jsonschema", "openai", "hypothesis", "sentencepiece", "scikit_build_core", "transformers")  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_fails_with_one_sentence() -> None:
    done = subprocess.run([sys.executable, "-m", "compare.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: make gpu needs a CUDA or ROCm device")


def test_measuring_needs_nothing_but_torch_safetensors_and_tokenizers(tiny_llama: Path) -> None:
    """The stages of whole models, on the CPU, in a process where nothing else can be imported; the compiled kernels aren't there either."""
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, numpy, safetensors.torch, tokenizers
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r} and name not in sys.modules:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
from compare import gpu, gpu_stages
import minfer.kernels.bench
from minfer.kernels.cpu import library
library.find = lambda: None
gpu_stages.PROMPT_TOKENS, gpu_stages.OUTPUT_TOKENS, gpu_stages.LONGEST, gpu_stages.REQUESTS = 9, 3, 64, 4
model = {str(tiny_llama)!r}
for form in ("bf16", "int4"):
    print(json.dumps(gpu_stages.bench(model, form, "cpu", 60.0, (1, 3))))
print(json.dumps(gpu_stages.offline_minfer(model, "cpu", 60.0, [([5, 6, 7], 4), ([8] * 20, 6)])))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    plain, quantised, offline = (json.loads(line) for line in done.stdout.splitlines())
    assert set(plain["batches"]) == set(quantised["batches"]) == {"1", "3"}
    assert all(one["decode_tokens_per_s"] > 0 and one["repeats"] == 3 for one in plain["batches"].values())
    assert plain["room_for_all"] is True
    assert "linear[int4 (groups of 32)]" in quantised["kernels"]
    assert (offline["requests"], offline["finished"], offline["output_tokens"]) == (2, 2, 10)


def test_transformers_does_the_same_requests(make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from minfer.loader import names

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    monkeypatch.setitem(names.KNOWN, "tiny", names.KnownModel("none/tiny", {"architectures": ["LlamaForCausalLM"], **shape}))
    work = [([5, 6, 7], 4), ([8] * 20, 6), ([9], 2)]
    measured = gpu_stages.offline_transformers("tiny", "cpu", 60.0, work, batch_size=2)
    assert (measured["finished"], measured["output_tokens"]) == (3, 12)
    late = gpu_stages.offline_transformers("tiny", "cpu", 0.0, work, batch_size=2)
    assert late["finished"] == 2, "the first batch always runs; what didn't is left out of the count"


def test_the_workload_is_the_one_that_the_docs_state() -> None:
    work = gpu_stages.requests(1000)
    assert len(work) == 256
    assert min(len(prompt) for prompt, _ in work) >= 100 <= min(output for _, output in work)
    assert max(len(prompt) for prompt, _ in work) <= 1024 >= max(output for _, output in work)
    assert work == gpu_stages.requests(1000)


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("print('{\"a\": 1}'); import sys; print('goodbye', file=sys.stderr)", "done"),
        ("print('{\"a\": 1}'); raise SystemExit(3)", "failed"),
        ("print('nothing to read')", "failed"),
        ("import time; print('begun', flush=True); time.sleep(60)", "cut off"),
    ],
)
def test_what_comes_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, state: str) -> None:
    (tmp_path / "stage_under_test.py").write_text(code)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    outcome = gpu.run_stage(gpu.Stage("one", 1.0, "stage_under_test", ()), -2.0)
    assert outcome["state"] == state
    assert outcome.get("result") == ({"a": 1} if "print('{" in code else None)
    assert ("said" in outcome) == (state != "done")


def test_every_stage_can_be_started() -> None:
    """Their modules and arguments exist: nobody notices before a GPU is lent otherwise."""
    for stage in gpu.stages("llama2-7b"):
        done = subprocess.run(
            [sys.executable, "-m", stage.module, *stage.arguments, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    for chosen in gpu_stages.TESTS:
        assert (ROOT / chosen[0]).is_file()
