"""The whole engine on the Triton kernels, and which engines get them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels.devices import DEVICE
from lora_adapters import write_adapter

from minfer import LLM, SamplingParams
from minfer.errors import ConfigError
from minfer.kernels import select_ops

PROMPTS = [[5, 9, 200, 17], list(range(40, 63)), [7]]
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def tokens(folder: Path, backend: str, asked: Sequence[str | None] | None = None, **settings: Any) -> list[list[int]]:
    """`asked`: by prompt, the LoRA adapter."""
    options = {"dtype": "float32", "device": DEVICE.type, "max_model_len": 128, "kv_cache_memory": 2**20, **settings}
    llm = LLM(str(folder), backend=backend, **options)
    if backend == "triton":
        assert set(llm.engine.core.loaded.ops.chosen.values()) == {"triton"}
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], GREEDY, use_tqdm=False, lora=asked)
    return [output.outputs[0].token_ids for output in outputs]


def test_an_engine_says_what_the_reference_says(tiny_llama: Path) -> None:
    expected = tokens(tiny_llama, "reference")
    assert tokens(tiny_llama, "triton", max_prefill_chunk=9, block_size=4) == expected


def test_over_an_fp8_cache(tiny_llama: Path) -> None:
    settings = {"kv_cache_dtype": "fp8", "max_prefill_chunk": 9}
    assert tokens(tiny_llama, "triton", **settings) == tokens(tiny_llama, "reference", **settings)


def test_draws_masks_and_logprobs_are_the_references(tiny_llama: Path) -> None:
    """A top-k of four hundred digits means all, and must not become a number of the device's."""
    wishes: list[dict[str, Any]] = [
        {"top_k": 10**400, "logprobs": 2},
        {"top_k": 30, "top_p": 0.9, "logprobs": 0},
        {"structured_outputs": {"regex": "[a-f]+"}, "min_p": 0.01},
    ]
    params = [SamplingParams(temperature=0.8, seed=seed, max_tokens=3, **wish) for seed, wish in enumerate(wishes)]
    outputs = []
    for backend in ("reference", "triton"):
        llm = LLM(str(tiny_llama), backend=backend, dtype="float32", device=DEVICE.type, max_model_len=128, kv_cache_memory=2**20)
        ops = llm.engine.core.loaded.ops
        assert all((op is not None) == (backend == "triton") for op in (ops.sample, ops.logprobs, ops.forbid))
        generated = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
        outputs.append([output.outputs[0] for output in generated])
    for expected, got in zip(*outputs, strict=True):
        assert got.token_ids == expected.token_ids
        for before, after in zip(expected.logprobs or [], got.logprobs or [], strict=True):
            assert list(after) == list(before)
            assert [one.logprob for one in after.values()] == pytest.approx([one.logprob for one in before.values()], abs=1e-4)
            assert [one.rank for one in after.values()] == [one.rank for one in before.values()]


def test_a_prefix_that_all_share_is_read_once(tiny_llama: Path) -> None:
    """The second step on: 32 cached tokens in common, and the counter says how many keys of a layer were not read again."""
    prompts = [{"prompt_token_ids": [*range(20, 53), last]} for last in (3, 4, 5)]
    said, saved = [], []
    for backend, least in (("reference", 0), ("triton", 64), ("triton", 65)):
        options: dict[str, Any] = {"dtype": "float32", "device": DEVICE.type, "max_model_len": 64, "kv_cache_memory": 2**20}
        llm = LLM(str(tiny_llama), backend=backend, shared_prefix=least, graphs=False, **options)
        llm.generate(prompts[0], SamplingParams(max_tokens=1), use_tqdm=False)
        said.append([output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)])
        saved.append(llm.engine.core.runner.builder.keys_saved)
    assert said[0] == said[1] == said[2]
    assert saved == [0, 4 * 64, 0]


def test_with_windows_biases_and_a_tied_head(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1, tie_word_embeddings=True)
    assert tokens(folder, "triton") == tokens(folder, "reference")


def test_with_heads_that_are_normalised(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("qwen3", head_dim=24)
    assert tokens(folder, "triton") == tokens(folder, "reference")


def test_with_adapters(tiny_llama: Path, tmp_path: Path) -> None:
    adapters = {name: str(write_adapter(tiny_llama, tmp_path / name, seed, r=rank)) for name, seed, rank in (("a", 0, 4), ("b", 1, 24))}
    asked = ["a", None, "b"]
    expected = tokens(tiny_llama, "reference", asked, lora=adapters)
    assert expected != tokens(tiny_llama, "reference")
    assert tokens(tiny_llama, "triton", asked, lora=adapters) == expected


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_with_experts(family: str, make_checkpoint: Callable[..., Path]) -> None:
    """Steps of many tokens, whose pairs are sorted, and of three, whose aren't; a shared expert and heads that are normalised."""
    qwen = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    more = {
        "mixtral": {"num_local_experts": 4},
        "qwen2_moe": {**qwen, "shared_expert_intermediate_size": 32},
        "qwen3_moe": {**qwen, "head_dim": 32, "norm_topk_prob": True},
    }
    folder = make_checkpoint(family, **more[family])
    assert tokens(folder, "triton", max_prefill_chunk=9) == tokens(folder, "reference")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about machines without a GPU")
def test_on_a_cpu_only_the_interpreter_runs_them() -> None:
    with pytest.raises(ConfigError, match="computes bfloat16 products wrongly"):
        select_ops(DEVICE, torch.bfloat16, "triton")
    code = "import torch; from minfer.kernels import select_ops; select_ops(torch.device('cpu'), torch.float32, 'triton')"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "ConfigError: backend triton needs a CUDA or ROCm device" in done.stderr


def test_without_the_package_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from minfer.kernels import select_ops; select_ops(torch.device('cpu'), torch.float32, 'triton')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert "pip install 'minfer[triton]'" in done.stderr


def test_types_it_does_not_compute_in() -> None:
    with pytest.raises(ConfigError, match=r"not torch.float64"):
        select_ops(DEVICE, torch.float64, "triton")
