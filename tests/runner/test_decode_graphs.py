"""Graphs of decode steps, with drafts and without: padded steps give what eager ones give, write what they write, and one capture serves a
bucket for good.

On a CPU the kernels run under Triton's interpreter and a capture is faked: it keeps the function. On a GPU it is a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from kernels.devices import DEVICE

from minfer.batch import Batch
from minfer.kernels import select_ops
from minfer.kvcache import KVCache
from minfer.layers.loading import load_weights
from minfer.model_config import ModelConfig, MoEConfig
from minfer.models import Model, create_model
from minfer.runner import BatchBuilder, RowSpan
from minfer.runner.buckets import Buckets
from minfer.runner.decode_graphs import DecodeGraphs, Run, cuda_recorder
from minfer.runner.upload import copy_later

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=96, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position_embeddings=128, sliding_windows=(None, 20),
)  # fmt: skip


EXPERTS = dataclasses.replace(
    CONFIG,
    architecture="Qwen2MoeForCausalLM",
    moe=MoEConfig(num_experts=5, experts_per_token=2, intermediate_size=32, norm_topk_prob=True, shared_intermediate_size=48),
)


def make_model(backend: str, config: ModelConfig) -> Model:
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        model = create_model(config, select_ops(DEVICE, torch.float32, backend), 128, DEVICE)
        load_weights(model, ((name, torch.randn(shape, generator=generator) * 0.2) for name, shape in config.tensor_shapes()))
    return model


@dataclass
class Row:
    token_ids: list[int]
    blocks: list[int]
    adapter: int = 0


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


class Pair:
    """The same model by these kernels, replayed, and by plain torch, as it comes. Token 0, which is what rows of padding have, is NaN to
    both, and so is what is in the caches before.
    """

    def __init__(self, buckets: Buckets, poison: float = torch.nan, config: ModelConfig = CONFIG) -> None:
        self.buckets = buckets
        self.record = FakeRecorder() if DEVICE.type == "cpu" else cuda_recorder()
        self.model, self.plain = make_model("triton", config), make_model("reference", config)
        self.cache, self.expected = (KVCache(CONFIG, 40, 16, torch.float32, DEVICE) for _ in range(2))
        for model in (self.model, self.plain):
            model.model.embed_tokens.weight.tensor[0] = poison
        for layer in (*self.cache.layers, *self.expected.layers):
            layer.k.fill_(poison)
            layer.v.fill_(poison)
        self.graphs = DecodeGraphs(
            lambda batch: self.model.forward_states(batch, self.cache, (0,)), self.record, most_tokens=buckets.most_tokens
        )

    def replay(self, batch: Batch, eager: Batch | None = None) -> list[torch.Tensor]:
        """The step's results, held against those of plain torch over the batch, or over another that says the same."""
        got = self.graphs.replay(batch)
        assert all(out.isfinite().all() for out in got)
        torch.testing.assert_close(got, list(self.plain.forward_states(eager or batch, self.expected, (0,))), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(self.cache.layers, self.expected.layers, strict=True):
            torch.testing.assert_close(ours.k, theirs.k, rtol=1e-4, atol=1e-4, equal_nan=True)
            torch.testing.assert_close(ours.v, theirs.v, rtol=1e-4, atol=1e-4, equal_nan=True)
        return got


LONGEST = 4
# Tokens that each row brings, and those that it takes back before, which were wrong drafts; 0: it isn't there.
Steps = list[list[int | tuple[int, int]]]
STEPS: Steps = [
    [17, 7, 3],  # prompts: eager
    [1, 1, 1],  # bucket of 4, a row of padding
    [1, 1, 1],
    [4, 2, 1],  # drafts: 8 rows, 4 requests
    [(1, 3), (3, 1), 1],  # the same bucket, with leftovers
    [1, 0, (2, 1)],  # 4 rows, 2 requests
    [(4, 2), 1, 1, 3, 2],  # two prompts that are short enough
    [4, 4, 4, 4, (4, 1)],  # the largest bucket, full
    [(3, 3), (4, 3), (4, 1), (4, 3), (2, 3)],  # and not full
    [1, 1, 1, 5, 1],  # more than a draft has: eager
    [1, 1, 1, 1, 1],
]


def batches(builder: BatchBuilder, steps: Steps) -> Iterator[Batch]:
    """Of each step. Rows keep their blocks, six of them."""
    known = [0] * 5
    for step in steps:
        spans = []
        for number, asked in enumerate(step):
            new, back = asked if isinstance(asked, tuple) else (asked, 0)
            start = known[number] - back
            known[number] = start + new
            if new:
                tokens = [1 + (position * 7 + number * 13) % (CONFIG.vocab_size - 1) for position in range(start + new)]
                spans.append(RowSpan(Row(tokens, [6 * number + n for n in range(-(-(start + new) // 16))]), start, new, new))
        if all(span.count == 1 for span in spans):
            yield builder.build_one_each([span.row for span in spans], [span.start for span in spans])
        else:
            yield builder.build(spans)


@torch.inference_mode()
def test_replay_equals_eager_and_padding_touches_nothing() -> None:
    pair = Pair(Buckets(5, LONGEST))
    builder = BatchBuilder(64, 5, 128, 16, DEVICE, buckets=pair.buckets, copy=copy_later)
    memory = set()
    for batch in batches(builder, STEPS):
        got = pair.replay(batch)
        assert (batch.padded is None) == (max(batch.query_lens_host) > LONGEST)
        if batch.padded is not None and max(batch.query_lens_host) > 1:
            memory.add(tuple(out.data_ptr() for out in got))
    assert len(memory) == 1, "what steps with drafts return is in one place, however many buckets there are"
    assert pair.graphs.captured == [(4, 2), (4, 4), (5, 5), (8, 4), (16, 5), (20, 5)]
    assert pair.graphs.replays == len(STEPS) - 2
    if isinstance(pair.record, FakeRecorder):
        assert (pair.record.records, pair.record.runs) == (6, len(STEPS) - 2)


@torch.inference_mode()
def test_padding_of_a_mixture_of_experts_touches_nothing() -> None:
    """Its rows are NaN, and so are their router's logits, in buckets whose pairs are sorted by expert (16 rows) and aren't (4, 8)."""
    pair = Pair(Buckets(5, LONGEST), config=EXPERTS)
    builder = BatchBuilder(64, 5, 128, 16, DEVICE, buckets=pair.buckets, copy=copy_later)
    for batch in batches(builder, [[17, 7, 3], [1, 1, 1], [4, 2, 1], [4, 1, 1, 3, 2]]):
        pair.replay(batch)
    assert pair.graphs.captured == [(4, 4), (8, 4), (16, 5)]


@torch.inference_mode()
def test_drafts_that_branch_have_graphs_of_their_own() -> None:
    """x y after a row's newest token, z in the place of y; then a chain again, in the same bucket."""
    pair = Pair(Buckets(2, LONGEST, rows=8))
    builder = BatchBuilder(64, 8, 128, 16, DEVICE, max_tail=3, buckets=pair.buckets, copy=copy_later)
    row, other = Row([1 + n % 90 for n in range(34)], [0, 1, 2]), Row([2 + n % 80 for n in range(9)], [7])
    pair.replay(builder.build([RowSpan(row, 0, 33, 1), RowSpan(other, 0, 8, 1)]))
    for x, y, z in ((5, 6, 7), (8, 9, 10)):
        tree = [RowSpan(row, 33, 3, 3, [x, y]), RowSpan(row, 35, 1, 1, [z], [36]), RowSpan(other, 8, 1, 1)]
        batch = builder.build(tree)
        assert batch.padded is not None and batch.padded.tails is not None
        pair.replay(batch)
        pair.replay(builder.build([RowSpan(row, 33, 3, 3, [x, z]), RowSpan(other, 8, 2, 2, [y])]))
    assert pair.graphs.captured == [(8, 2), (8, 4)]
    assert pair.graphs.replays == 4


@torch.inference_mode()
def test_a_step_with_a_shared_prefix_has_a_graph_of_its_own() -> None:
    """Three requests whose first blocks are the first one's; how many of them, a replay is told anew. Then with drafts."""
    pair = Pair(Buckets(4, LONGEST), poison=0.5)  # what is shared was never computed
    builder = BatchBuilder(64, 4, 128, 16, DEVICE, buckets=pair.buckets, copy=copy_later, shared_prefix=1)
    plain = BatchBuilder(64, 4, 128, 16, DEVICE, copy=copy_later)
    for blocks, total, drafts in ((0, 70, 0), (4, 71, 0), (2, 72, 0), (3, 73, 2), (0, 74, 2), (2, 75, 2)):
        rows = [Row(list(range(total + n)), [*range(blocks), *range(blocks + 6 * n, 6 * n + 6)]) for n in range(3)]
        starts = [len(row.token_ids) - 1 for row in rows]
        if drafts:
            spans = [RowSpan(row, start, 1 + n, 1 + n, [5, 6][:n]) for n, (row, start) in enumerate(zip(rows, starts, strict=True))]
            batch, eager = builder.build(spans), plain.build(spans)
        else:
            batch, eager = builder.build_one_each(rows, starts), plain.build_one_each(rows, starts)
        assert batch.shared_host == 16 * blocks
        pair.replay(batch, eager)
    assert pair.graphs.captured == [(4, 4), (8, 4)]
    assert pair.graphs.replays == 6
    if isinstance(pair.record, FakeRecorder):
        assert (pair.record.records, pair.record.runs) == (4, 6)
