"""`minfer fit`: its sums against what loading really takes, and its remedies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minfer.runner import memory


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda size: monkeypatch.setattr(memory, "available_memory", lambda device: size)


def test_the_sum(minfer: Callable, tiny_llama: Path, free: Callable[[int], None]) -> None:
    free(1 << 30)
    ran = minfer("fit", tiny_llama, "--dtype", "float32", "--ctx", 100, "--parallel", 3, "--json")
    values = ran.json
    assert ran.code == 0
    assert values["weights_bytes"] == sum(t.nbytes for t in loaded(tiny_llama))
    assert values["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # K and V, layers, KV heads, head_dim, float32
    assert values["kv_bytes"] == 3 * 112 * 512, "whole blocks of 16 tokens"
    assert values["needed_bytes"] == values["weights_bytes"] + values["kv_bytes"] + values["buffer_bytes"]
    assert values["verdict"] == "yes"


def loaded(folder: Path) -> list:
    from safetensors.torch import load_file

    return list(load_file(folder / "model.safetensors").values())


def test_a_quantised_form_is_counted_matrix_by_matrix(minfer: Callable, smollm2_gguf: Path, free: Callable[[int], None]) -> None:
    free(64 << 30)  # a model that doesn't fit into what happens to be free ends in an error beside the table
    sizes = {a["quant"]: a["weights_bytes"] for a in minfer("fit", "llama2-7b", "--ctx", 16, "--json").json["alternatives"]}
    assert sizes["none"] == 2 * 6_738_415_616
    assert 6.7e9 < sizes["int8"] < 7.5e9
    assert 3.5e9 < sizes["int4"] < 4.6e9
    own = minfer("fit", "smollm2-135m", "--ctx", 16, "--json").json
    assert 0.9 * smollm2_gguf.stat().st_size < own["weights_bytes"] < 1.6 * smollm2_gguf.stat().st_size


def test_what_does_not_fit_says_what_would(minfer: Callable, free: Callable[[int], None]) -> None:
    free(8 << 30)
    ran = minfer("fit", "llama2-7b", "--ctx", 4096)
    assert ran.code == 1
    assert "it does NOT fit" in ran.out
    assert "--quant int4" in ran.err
    free(1 << 30)
    assert "take a smaller model" in minfer("fit", "llama2-7b").err
    assert minfer("fit", "llama2-7b", "--json").out.count('"verdict"') == 1


def test_the_context_that_it_promises_is_served(minfer: Callable, tiny_llama: Path, free: Callable[[int], None]) -> None:
    free(3 << 20)
    values = minfer("fit", tiny_llama, "--dtype", "float32", "--parallel", 4, "--max-num-batched-tokens", 64, "--json").out
    assert "context_that_fits" in values
    longest = minfer("fit", tiny_llama, "--ctx", 513)
    assert longest.code == 2
    assert "512 tokens" in longest.err
