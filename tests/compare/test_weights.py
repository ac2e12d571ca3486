"""The weights every engine starts from: bf16 as torch rounds, safetensors as its own library reads, GGUF as its own reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compare import weights
from compare.errors import CompareError
from compare.gguf_export import RANDOM, gguf_name, write_gguf, write_or_share_gguf


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> weights.Weights:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    made = weights.get_weights("tiny")
    patch.undo()
    return made


def test_bf16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32) * 10 ** np.linspace(-6, 6, 10_000, dtype=np.float32)
    ours = weights._to_bf16(values)
    theirs = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    assert (ours == theirs).all()


def test_the_folder_is_one_transformers_can_read(tiny: weights.Weights) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32)
    stored = load_file(tiny.folder / "model.safetensors")
    assert set(stored) == {n for n, _ in model.named_parameters()}
    assert torch.equal(stored["model.layers.1.mlp.up_proj.weight"].float(), model.model.layers[1].mlp.up_proj.weight)
    assert not tiny.real


def test_many_shards_hold_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 3000)
    tensors = {f"t{i}": weights._to_bf16(np.full((30, 20), i, dtype=np.float32)) for i in range(5)}
    weights._save(tmp_path, iter(tensors.items()))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name, file in index.items():
        assert (load_file(tmp_path / file)[name].view(torch.uint16).numpy() == tensors[name]).all()


@pytest.mark.parametrize("vocabulary", [False, True])
def test_gguf_holds_the_same_values_with_q_and_k_reordered(tiny: weights.Weights, tmp_path: Path, vocabulary: bool) -> None:
    write_gguf(tiny.folder, tmp_path / "f.gguf", "BF16", vocabulary=vocabulary)
    reader = gguf.GGUFReader(tmp_path / "f.gguf")
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    stored = load_file(tiny.folder / "model.safetensors")
    assert len(found) == len(stored)
    heads = {"q_proj": tiny.config["num_attention_heads"], "k_proj": tiny.config["num_key_value_heads"]}
    for name, tensor in stored.items():
        ours = found[gguf_name(name)]
        for part, count in heads.items():
            if part in name:
                assert not np.array_equal(ours, tensor.float().numpy())
                ours = weights._unpermute(ours, count)
        assert np.array_equal(ours, tensor.float().numpy()), name


def test_engines_that_read_gguf_share_one_file_of_random_weights(tiny: weights.Weights, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_or_share_gguf(tiny.folder, tmp_path / name, "Q4_0")
    assert (tmp_path / "a").resolve() == (tmp_path / "b").resolve()
    own = tmp_path / "own"
    shutil.copytree(tiny.folder, own, ignore=shutil.ignore_patterns(RANDOM, "*.gguf"))
    write_or_share_gguf(own, tmp_path / "c", "Q4_0")
    assert not (tmp_path / "c").is_symlink()
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_what_was_made_here_is_hashed_once(tiny: weights.Weights) -> None:
    assert (tiny.folder / "sha256").read_text() == tiny.hash
    (tiny.folder / "sha256").write_text("known")
    assert weights._describe("tiny", tiny.folder, real=False).hash == "known"
    (tiny.folder / "sha256").unlink()
    assert weights._describe("tiny", tiny.folder, real=False).hash == tiny.hash


def test_unknown_models_are_refused_with_the_names() -> None:
    with pytest.raises(CompareError, match="smollm2-135m"):
        weights.get_weights("gpt-5")
