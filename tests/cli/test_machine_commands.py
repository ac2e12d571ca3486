"""`minfer inspect`, `list` and `env`."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minfer.cli.inspect_model import is_on_disk
from minfer.loader import hub


def test_inspect_against_transformers(minfer: Callable, tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    values = minfer("inspect", tiny_llama, "--json", "--dtype", "float32").json
    assert values["parameters"] == model.num_parameters()
    assert values["architecture"] == "LlamaForCausalLM"
    assert values["disk_bytes"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert values["disk_bytes_by_dtype"] == {"F32": values["disk_bytes"]}
    assert values["files"] == [str(tiny_llama / "model.safetensors")]
    assert values["weights_bytes"] == model.num_parameters() * 4
    assert values["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # K and V, layers, KV heads, head_dim, float32
    assert (values["on_disk"], values["quantization"], values["dtype"]) == (True, None, "float32")


def test_inspect_says_what_fits(minfer: Callable, tiny_llama: Path) -> None:
    """1 MiB of KV at 512 bytes a token is 2,048 tokens: 128 blocks."""
    values = minfer("inspect", tiny_llama, "--json", "--dtype", "float32", "--kv-cache-memory", "1M", "--max-num-seqs", 5).json
    assert values["full_length_sequences"] == 2048 // 512
    assert values["max_context_by_users"] == {"1": 512, "4": 512, "5": 400, "16": 128, "64": 32}


def test_what_is_said_to_fit_can_be_loaded(minfer: Callable, tiny_llama: Path) -> None:
    from minfer import LLM

    flags = {"kv_cache_memory": 1 << 20, "dtype": "float32", "threads": 1}
    cache = LLM(str(tiny_llama), **flags).engine.core.loaded.cache
    assert cache.num_blocks * cache.block_size == 2048


def test_inspect_says_how_many_times_more_tokens_a_quantised_cache_holds(minfer: Callable, tiny_llama: Path) -> None:
    """A row of 16 numbers: 64 bytes in float32, 32 in bfloat16, 16 and a scale of 2 in 8 bits, 8 and 2 in int4."""
    flags = ("--dtype", "float32", "--kv-cache-memory", "1M")
    values = minfer("inspect", tiny_llama, "--json", *flags).json
    expected = {"fp32": 1, "bf16": 2, "fp16": 2, "fp8": 64 / 18, "fp8_e5m2": 64 / 18, "int8": 64 / 18, "int4": 64 / 10}
    assert values["kv_capacity_by_dtype"] == pytest.approx(expected)
    assert values["kv_tokens_by_dtype"]["int4"] == 2**20 // (16 * 8 * 10) * 16  # of blocks of 16 tokens with 8 rows each
    assert "int4 13,104 (6.40x)" in minfer("inspect", tiny_llama, *flags).out


def test_inspect_counts_quantised_weights_as_they_are_kept(minfer: Callable, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain = make_checkpoint("llama", intermediate_size=128)
    assert minfer("quantize", plain, tmp_path / "out", "--method", "gptq", "--group-size", 32, "--samples", 2, "--seqlen", 8).code == 0
    flags = ("--dtype", "float32", "--json")
    on_disk = sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / "model.safetensors").values())
    assert minfer("inspect", tmp_path / "out", *flags).json["weights_bytes"] == on_disk
    dense = minfer("inspect", tmp_path / "out", "--quant", "none", *flags).json["weights_bytes"]
    assert dense == minfer("inspect", plain, *flags).json["weights_bytes"]
    assert on_disk < minfer("inspect", plain, "--quant", "int8", *flags).json["weights_bytes"] < dense


def test_inspect_of_the_real_model_reads_headers_only(minfer: Callable, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minfer.loader.gguf import GGUFCheckpoint

    def refuse(self: object, name: str) -> torch.Tensor:
        raise AssertionError(f"read {name}")

    monkeypatch.setattr(GGUFCheckpoint, "read", refuse)
    values = minfer("inspect", "smollm2-135m", "--json").json
    assert values["parameters"] == 134_515_008
    assert values["quantization"] == "Q4_1"
    assert 0.9 * smollm2_gguf.stat().st_size < values["disk_bytes"] < smollm2_gguf.stat().st_size
    text = minfer("inspect", "smollm2-135m")
    assert "134.5 M" in text.out
    assert "Q4_1" in text.out


def test_inspect_of_a_model_that_is_not_here(minfer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **more: object) -> Path:
        raise AssertionError("downloaded")

    monkeypatch.setattr(hub, "download", refuse)
    ran = minfer("inspect", "llama2-7b", "--json")
    assert ran.json["on_disk"] is False
    assert ran.json["parameters"] == 6_738_415_616
    assert (ran.json["disk_bytes"], ran.json["files"]) == (None, [])
    assert "not on this machine" in minfer("inspect", "llama2-7b").err


def test_is_on_disk(tiny_llama: Path, smollm2_gguf: Path) -> None:
    assert is_on_disk(str(tiny_llama))
    assert is_on_disk(str(smollm2_gguf))
    assert is_on_disk("smollm2-135m")
    assert not is_on_disk("llama2-7b")
    assert not is_on_disk("someone/something")


def test_inspect_errors(minfer: Callable, tmp_path: Path) -> None:
    ran = minfer("inspect", tmp_path, "--json")
    assert ran.code == 2
    assert "config.json" in ran.json["error"]["message"]
    ran = minfer("inspect", "llama2-7b-awq")
    assert ran.code == 2
    assert "minfer inspect llama2-7b`" in ran.err


def test_list(minfer: Callable, smollm2_gguf: Path) -> None:
    values = minfer("list", "--json").json
    [real] = [model for model in values["offline"] if model["location"] == str(smollm2_gguf)]
    assert (real["name"], real["format"], real["size_bytes"]) == ("smollm2-135m", "gguf", smollm2_gguf.stat().st_size)
    assert values["known"]["llama2-7b"]["repo"] == "meta-llama/Llama-2-7b-chat-hf"
    text = minfer("list").out
    assert "smollm2-135m" in text
    assert "llama3.1-8b" in text


def test_env(minfer: Callable) -> None:
    values = minfer("env", "--json", "--device", "cpu", "--backend", "reference", "--threads", 1).json
    assert values["python"] == platform.python_version()
    assert values["packages"]["torch"] == torch.__version__
    assert (values["device"], values["backends"], values["torch_threads"]) == ("cpu", ["reference"], 1)
    assert set(values["kernels"].values()) == {"reference"}
    assert values["free_memory_bytes"] > 0
    assert "torch" in minfer("env", "--device", "cpu").out
    assert minfer("env", "--backend", "nope").code == 2
