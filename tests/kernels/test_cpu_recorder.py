"""A recorded step replays what eager execution computes, at other sizes, with intermediates packed into one arena."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernels.batches import make_batch, make_cache

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels.cpu import CpuBackend
from minfer.kernels.cpu.recorder import CpuGraph, StepRecorder
from minfer.kvcache import LayerCache

HEADS, KV_HEADS, DIM = 4, 2, 16
WIDTH = HEADS * DIM
BLOCKS = 40


class Step:
    """A stack of layers without matrices: norms, rotary, KV, attention, activation, each layer over its own cache."""

    def __init__(self, cpu: CpuBackend, layers: int = 3) -> None:
        self.cpu = cpu
        self.select = cpu.runtime.op("select_rows", "ptr x, ptr index, ptr out, int rows, int row_bytes, int stride_bytes")
        self.caches = [make_cache(BLOCKS, KV_HEADS, 16, DIM, torch.bfloat16, seed) for seed in range(layers)]
        generator = torch.Generator().manual_seed(7)
        self.features = torch.randn(64, 2 * WIDTH, generator=generator).bfloat16()  # gathered by slot, which is 64 bits wide
        self.weight = torch.rand(WIDTH, generator=generator).bfloat16()
        angles = torch.rand(512, DIM // 2, generator=generator) * 6
        self.table = torch.cat((angles.cos(), angles.sin()), -1)

    def __call__(self, batch: Batch) -> torch.Tensor:
        cpu, rows = self.cpu, batch.num_tokens
        gate_up = cpu.runtime.empty((rows, 2 * WIDTH), torch.bfloat16)
        pointers = (cpu.runtime.ptr(self.features), cpu.runtime.ptr(batch.slots), cpu.runtime.ptr(gate_up))
        self.select(*pointers, rows, gate_up.shape[1] * 2, gate_up.shape[1] * 2)
        x, residual = cpu.act_mul(gate_up, "silu"), None
        for cache in self.caches:
            x, residual = cpu.rms_norm(x, self.weight, 1e-5, residual)
            k, v = x.view(rows, HEADS, DIM).split((KV_HEADS, KV_HEADS), dim=1)
            q = cpu.rms_norm(x, self.weight, 1e-5)[0].view(rows, HEADS, DIM)
            cpu.rotary_kv(q, k, v, batch.positions, self.table, cache, batch.slots)
            x = cpu.attention(q, cache, batch, 0.25).view(rows, WIDTH)
        return cpu.rms_norm(x, self.weight, 1e-5, residual)[0]


def small_slots(lengths: list[tuple[int, int]], seed: int) -> Batch:
    batch = make_batch(lengths, 16, 4, seed)  # 4 blocks of 16: slots below 64 index the features too
    assert int(batch.slots.max()) < 64
    return batch


def largest(tokens: int, requests: int) -> Batch:
    batch = make_batch([(1, 1)] * requests, 16, requests)
    batch.token_ids, batch.positions = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
    batch.slots = torch.zeros(tokens, dtype=torch.int64)
    batch.tails = torch.zeros(requests, 1, dtype=torch.int64)
    return batch


def record(cpu: CpuBackend, step: Callable[[Batch], torch.Tensor], tokens: int = 64, requests: int = 5) -> CpuGraph:
    batch = largest(tokens, requests)
    with torch.inference_mode():
        return StepRecorder(cpu.runtime, batch).record(lambda: [step(batch)])


def test_replay_equals_eager_for_any_batch(cpu: CpuBackend) -> None:
    eager, recorded = Step(cpu), Step(cpu)
    graph = record(cpu, recorded)
    for seed, lengths in enumerate(([(16, 16), (3, 20)], [(1, 17), (1, 21)], [(1, 18)], [(30, 48)], [(1, 1)])):
        batch = small_slots(lengths, seed=0)
        expected = eager(batch)
        assert torch.equal(graph.replay(batch)[0], expected), (seed, lengths)
        for left, right in zip(eager.caches, recorded.caches, strict=True):
            assert torch.equal(left.k, right.k)
            assert torch.equal(left.v, right.v)


def test_tails_are_of_the_batch_and_not_of_the_recording(cpu: CpuBackend) -> None:
    eager, recorded = Step(cpu), Step(cpu)
    graph = record(cpu, recorded)
    batch = small_slots([(3, 20), (1, 17)], seed=0)
    for tails in (None, torch.tensor([[Batch.NO_TAIL, 0, 0], [15, 1, 0]]), None):
        batch.tails = tails
        assert torch.equal(graph.replay(batch)[0], eager(batch))


def test_recording_computes_nothing(cpu: CpuBackend) -> None:
    step = Step(cpu)
    before = [LayerCache(cache.k.clone(), cache.v.clone()) for cache in step.caches]
    record(cpu, step)
    for left, right in zip(before, step.caches, strict=True):
        assert torch.equal(left.k, right.k)


def test_layers_share_the_arena(cpu: CpuBackend) -> None:
    shallow, deep = record(cpu, Step(cpu, layers=2)), record(cpu, Step(cpu, layers=6))
    assert deep.num_calls > 2 * shallow.num_calls
    assert deep.arena_bytes == shallow.arena_bytes


def test_a_torch_operation_between_ops_is_refused(cpu: CpuBackend) -> None:
    step = Step(cpu)
    with pytest.raises(ConfigError, match="aten"):
        record(cpu, lambda batch: step(batch) + 1)
    assert cpu.runtime.recorder is None


def test_other_row_counts_are_refused(cpu: CpuBackend) -> None:
    step = Step(cpu)
    with pytest.raises(ConfigError, match="rows are 1, but the step has 64"):
        record(cpu, lambda batch: cpu.act_mul(step(batch)[:1], "silu"))


def test_too_large_a_batch_is_refused(cpu: CpuBackend) -> None:
    graph = record(cpu, Step(cpu), tokens=8)
    with pytest.raises(ConfigError, match="larger than the 8"):
        graph.replay(small_slots([(9, 9)], 0))
