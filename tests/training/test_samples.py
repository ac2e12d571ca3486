"""What a head is trained on is complete: every token of every answer with the states the model had at it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from minfer.config import EngineConfig
from minfer.runner import load_model
from minfer.training.samples import Collector, collect, shards_in


def test_states_of_every_step_are_kept(make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long that takes: adaptive speculation would stop looking at steps that are dear and bring no drafts."""
    follow = Collector.follow

    def slow(self: Collector, *arguments: Any) -> None:
        time.sleep(0.003)
        follow(self, *arguments)

    monkeypatch.setattr(Collector, "follow", slow)
    folder = make_checkpoint("llama", num_hidden_layers=6, eos_token_id=511)
    loaded = load_model(EngineConfig(model=str(folder), dtype="float32", max_model_len=256, threads=1, prefix_caching=False))
    prompts = [[5 + i, 6, 7, 8] for i in range(4)]
    list(collect(loaded, prompts, [1, 2, 3], tmp_path, 10**6, 120, [0.0]))
    (shard,) = shards_in(tmp_path)
    tensors = load_file(shard)
    assert tensors["ends"].tolist() == [122, 244, 366, 488]  # of 4 + 120 tokens; who is over is not looked at once more
    assert tensors["final"].shape[0] == tensors["tokens"].shape[0] == 488
