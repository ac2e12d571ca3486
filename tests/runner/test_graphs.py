"""A captured step of a whole model: bit-equal to eager, for every mix of prompts, chunks and single tokens."""

from __future__ import annotations

import pytest
import torch
from kernels.batches import make_batch

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels import select_ops
from minfer.kernels.cpu.library import find
from minfer.kvcache import KVCache
from minfer.layers.loading import load_weights
from minfer.model_config import ModelConfig
from minfer.models import FINAL, Model, create_model
from minfer.runner.graphs import can_capture, capture

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    qkv_bias=True,
    sliding_windows=(None, 20, None),
)
STEPS = ([(40, 40), (7, 7)], [(1, 41), (1, 8)], [(1, 42)], [(3, 45), (1, 9), (30, 30)], [(1, 46), (1, 10), (1, 31)])


def make_model(dtype: torch.dtype, backend: str) -> Model:
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        model = create_model(CONFIG, select_ops(CPU, dtype, backend, threads=2), 256, CPU)
        load_weights(model, ((name, torch.randn(shape, generator=generator) * 0.2) for name, shape in CONFIG.tensor_shapes()))
    return model


def batch_of(lengths: list[tuple[int, int]]) -> Batch:
    batch = make_batch(lengths, 16, 16)
    for row in range(len(lengths)):  # each request keeps its own blocks from step to step
        batch.block_tables[row] = torch.arange(batch.block_tables.shape[1]) + 5 * row
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor([new for new, _ in lengths]))
    batch.slots = batch.block_tables[rows, (batch.positions // 16).long()].long() * 16 + batch.positions % 16
    batch.token_ids = (batch.positions * 7 + rows.int() * 13) % CONFIG.vocab_size
    return batch


@pytest.mark.skipif(find() is None, reason="the compiled CPU kernels are not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_replay_equals_eager(dtype: torch.dtype, stored: torch.dtype | None) -> None:
    model = make_model(dtype, "cpu")
    eager, replayed = (KVCache(CONFIG, 16, 16, stored or dtype, CPU) for _ in range(2))
    after = (0, 1, CONFIG.num_layers, FINAL)  # inner states that a drafting head may want: they must outlive the layers after them
    ops = model.model.layers[0].self_attn.ops
    graph = capture(lambda batch: model.forward_states(batch, replayed, after), ops, max_tokens=128, max_requests=4)
    for lengths in STEPS:
        batch = batch_of(lengths)
        with torch.inference_mode():
            outputs = graph.replay(batch)
            for ours, theirs in zip(outputs, model.forward_states(batch, eager, after), strict=True):
                assert torch.equal(ours, theirs), lengths
            assert torch.equal(outputs[0], model(batch, eager)), lengths


def test_only_a_table_of_one_recordable_backend_is_captured() -> None:
    ops = select_ops(CPU, torch.float32, "reference")
    assert not can_capture(ops)
    with pytest.raises(ConfigError, match="rms_norm=reference"):
        capture(lambda batch: [torch.zeros(1)], ops, 8, 2)
