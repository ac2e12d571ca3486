"""Graphs of decode steps: padded steps give what eager ones give, write what they write, and one capture serves a bucket for good.

On a CPU the kernels run under Triton's interpreter and a capture is faked: it keeps the function. On a GPU it is a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kernels.devices import DEVICE

from minfer.batch import Batch
from minfer.config import ModelConfig
from minfer.kernels import select_ops
from minfer.kvcache import KVCache
from minfer.layers.loading import load_weights
from minfer.models import Model, create_model
from minfer.runner import BatchBuilder, RowSpan
from minfer.runner.decode_graphs import DecodeGraphs, Run, cuda_recorder
from minfer.runner.upload import buckets, copy_later

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=96, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position_embeddings=128, sliding_windows=(None, 20),
)  # fmt: skip


def make_model() -> Model:
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        model = create_model(CONFIG, select_ops(DEVICE, torch.float32, "triton"), 128, DEVICE)
        load_weights(model, ((name, torch.randn(shape, generator=generator) * 0.2) for name, shape in CONFIG.tensor_shapes()))
    return model


@dataclass
class Row:
    token_ids: list[int]
    blocks: list[int]


def make_builder(most: int) -> BatchBuilder:
    return BatchBuilder(64, most, 128, 16, DEVICE, buckets=buckets(most), copy=copy_later)


def batch_of(builder: BatchBuilder, lengths: list[tuple[int, int]]) -> Batch:
    """Of each row its last `new` of `total` tokens."""
    rows = [
        Row([(position * 7 + row * 13) % CONFIG.vocab_size for position in range(total)], [6 * row + n for n in range(-(-total // 16))])
        for row, (_, total) in enumerate(lengths)
    ]
    if all(new == 1 for new, _ in lengths):
        return builder.build_one_each(rows, [total - 1 for _, total in lengths])
    return builder.build([RowSpan(row, total - new, new, new) for row, (new, total) in zip(rows, lengths, strict=True)])


class FakeRecorder:
    def __init__(self) -> None:
        self.records = self.runs = 0

    def __call__(self, run: Run) -> Run:
        self.records += 1
        run()

        def replay() -> Sequence[torch.Tensor]:
            self.runs += 1
            return run()

        return replay


def filled() -> KVCache:
    cache = KVCache(CONFIG, 40, 16, torch.float32, DEVICE)
    for layer in cache.layers:
        layer.k.fill_(7.0)
        layer.v.fill_(-3.0)
    return cache


STEPS = (
    [(40, 40), (7, 7), (3, 3)],  # a prompt: eager
    [(1, 41), (1, 8), (1, 4)],  # bucket of 4, one row of padding
    [(1, 42), (1, 9), (1, 5)],
    [(1, 43), (3, 12), (1, 6)],  # drafts: eager
    [(1, 44)],
    [(1, 45), (1, 13), (1, 7), (1, 1), (1, 1)],  # the largest bucket, full
)


@torch.inference_mode()
def test_replay_equals_eager_and_padding_touches_nothing() -> None:
    model, cache, expected_cache = make_model(), filled(), filled()
    record = FakeRecorder() if DEVICE.type == "cpu" else cuda_recorder()
    graphs = DecodeGraphs(lambda batch: model.forward_states(batch, cache, (0,)), record)
    builder = make_builder(5)
    for lengths in STEPS:
        batch = batch_of(builder, lengths)
        got, expected = graphs.replay(batch), model.forward_states(batch, expected_cache, (0,))
        torch.testing.assert_close(got, list(expected), rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(cache.layers, expected_cache.layers, strict=True):
            torch.testing.assert_close(ours.k, theirs.k, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.v, theirs.v, rtol=1e-5, atol=1e-5)
    assert graphs.captured == [1, 4, 5]
    assert graphs.replays == 4
    if isinstance(record, FakeRecorder):
        assert (record.records, record.runs) == (3, 4)


@torch.inference_mode()
def test_a_step_with_a_shared_prefix_has_a_graph_of_its_own() -> None:
    """Three requests whose first blocks are the first one's; how many of them, a replay is told anew."""
    model, cache, expected_cache = make_model(), filled(), filled()
    record = FakeRecorder() if DEVICE.type == "cpu" else cuda_recorder()
    graphs = DecodeGraphs(lambda batch: model.forward_states(batch, cache, (0,)), record)
    builder = BatchBuilder(64, 4, 128, 16, DEVICE, buckets=buckets(4), copy=copy_later, shared_prefix=1)
    plain = BatchBuilder(64, 4, 128, 16, DEVICE, copy=copy_later)
    for blocks, total in ((0, 70), (4, 71), (2, 72)):
        rows = [Row(list(range(total + n)), [*range(blocks), *range(blocks + 6 * n, 6 * n + 6)]) for n in range(3)]
        starts = [len(row.token_ids) - 1 for row in rows]
        batch = builder.build_one_each(rows, starts)
        assert batch.shared_host == 16 * blocks
        expected = model.forward_states(plain.build_one_each(rows, starts), expected_cache, (0,))
        torch.testing.assert_close(graphs.replay(batch), list(expected), rtol=1e-5, atol=1e-5)
    assert graphs.captured == [4]
    assert graphs.replays == 3
    if isinstance(record, FakeRecorder):
        assert (record.records, record.runs) == (2, 3)
