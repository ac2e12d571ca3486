"""Graphs of decode steps: padded steps give what eager ones give, write what they write, and one capture serves a bucket for good.

On a CPU the kernels run under Triton's interpreter and a capture is faked: it keeps the function. On a GPU it is a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from kernels.batches import make_batch
from kernels.devices import DEVICE, moved

from minfer.batch import Batch
from minfer.config import ModelConfig
from minfer.kernels import select_ops
from minfer.kvcache import KVCache
from minfer.layers.loading import load_weights
from minfer.models import Model, create_model
from minfer.runner.decode_graphs import DecodeGraphs, Run, cuda_recorder

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


def batch_of(lengths: list[tuple[int, int]]) -> Batch:
    batch = make_batch(lengths, 16, 40)
    batch.block_tables = torch.stack([torch.arange(batch.block_tables.shape[1]).int() + 6 * row for row in range(len(lengths))])
    rows = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor([new for new, _ in lengths]))
    batch.slots = batch.block_tables[rows, (batch.positions // 16).long()].long() * 16 + batch.positions % 16
    batch.token_ids = (batch.positions * 7 + rows.int() * 13) % CONFIG.vocab_size
    return moved(batch)


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
    graphs = DecodeGraphs(lambda batch: model.forward_states(batch, cache, (0,)), DEVICE, 5, 128, 16, record)
    for lengths in STEPS:
        batch = batch_of(lengths)
        got, expected = graphs.replay(batch), model.forward_states(batch, expected_cache, (0,))
        torch.testing.assert_close(got, list(expected), rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(cache.layers, expected_cache.layers, strict=True):
            torch.testing.assert_close(ours.k, theirs.k, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.v, theirs.v, rtol=1e-5, atol=1e-5)
    assert graphs.captured == [1, 4, 5]
    assert graphs.replays == 4
    if isinstance(record, FakeRecorder):
        assert (record.records, record.runs) == (3, 4)


def test_what_stood_in_the_padding_before_is_gone() -> None:
    """A step of four, then one of three in the same bucket: the fourth row must neither write nor read again."""
    seen: list[Batch] = []

    def step(batch: Batch) -> list[torch.Tensor]:
        seen.append(batch)
        return [batch.slots[:, None].float()]

    graphs = DecodeGraphs(step, DEVICE, 8, 128, 16, FakeRecorder())
    graphs.replay(batch_of([(1, 20), (1, 30), (1, 40), (1, 50)]))
    (out,) = graphs.replay(batch_of([(1, 21), (1, 31), (1, 41)]))
    static = seen[-1]
    assert out.shape[0] == 3
    assert static.slots[3].item() == -1
    assert static.seq_lens.tolist() == [21, 31, 41, 0]
    assert static.query_start.tolist() == [0, 1, 2, 3, 3]
    assert static.query_lens_host == [1] * 4 and static.seq_lens_host == [128] * 4


@pytest.mark.parametrize(("largest", "expected"), [(1, [1]), (6, [1, 2, 4, 6]), (20, [1, 2, 4, 8, 16, 20])])
def test_buckets(largest: int, expected: list[int]) -> None:
    graphs = DecodeGraphs(lambda batch: [batch.slots], DEVICE, largest, 16, 16, FakeRecorder())
    assert graphs.buckets == expected
