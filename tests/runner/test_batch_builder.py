"""Batches against ones written down token by token, over steps in which rows come, grow, change places and go."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minfer.batch import Batch
from minfer.runner import BatchBuilder, RowSpan

SIZE = 4
MAX_LEN = 48


@dataclass(eq=False)
class Row:
    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


def spelled(spans: list[RowSpan]) -> dict[str, list[int]]:
    """Every field but the tables, one token at a time."""
    out: dict[str, list[int]] = {name: [] for name in ("token_ids", "positions", "slots", "query_start", "seq_lens", "logits_at")}
    out["query_start"].append(0)
    for span in spans:
        tokens = [*span.row.token_ids, *span.drafts, 0]
        for position in range(span.start, span.start + span.count):
            out["token_ids"].append(tokens[position])
            out["positions"].append(position)
            out["slots"].append(span.row.blocks[position // SIZE] * SIZE + position % SIZE)
        end = len(out["token_ids"])
        out["query_start"].append(end)
        out["seq_lens"].append(span.start + span.count)
        out["logits_at"] += range(end - span.logits, end)
    return out


def check(batch: Batch, spans: list[RowSpan]) -> None:
    for name, values in spelled(spans).items():
        assert getattr(batch, name).tolist() == values, name
    for row, span in zip(batch.block_tables.tolist(), spans, strict=True):
        assert row[: len(span.row.blocks)] == span.row.blocks
    assert batch.block_tables.shape == (len(spans), max(len(span.row.blocks) for span in spans))
    assert batch.query_lens_host == [span.count for span in spans]
    assert batch.seq_lens_host == batch.seq_lens.tolist()
    assert batch.slots.dtype == batch.logits_at.dtype == torch.int64 and batch.token_ids.dtype == torch.int32


steps = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 1, 1, 3, 9]), st.sampled_from([0, 0, 2])), min_size=1, max_size=6),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(script=steps, moved=st.sets(st.integers(0, 25)))
def test_batches_are_what_their_rows_say(script: list[list[tuple[int, int, int]]], moved: set[int]) -> None:
    """In the steps `moved` every table is another list with other blocks in it, as after a preemption. Steps of one token each are
    built either way.
    """
    builder = BatchBuilder(64, 6, MAX_LEN, SIZE, torch.device("cpu"))
    rows = [Row([100 * n + i for i in range(MAX_LEN)]) for n in range(6)]
    free = 1
    for number, step in enumerate(script):
        spans = []
        for name, count, drafts in {name: (name, count, drafts) for name, count, drafts in step}.values():
            row = rows[name]
            if row.computed + count + drafts > MAX_LEN:
                row.computed, row.blocks = 0, []
            if number in moved:
                row.blocks = [free + i for i in range(len(row.blocks))]
                free += len(row.blocks)
            end = row.computed + count + drafts
            while len(row.blocks) * SIZE < end:
                row.blocks.append(free)
                free += 1
            known = Row(row.token_ids[: row.computed + count], row.blocks)
            spans.append(RowSpan(known, row.computed, count + drafts, min(count, 1) + drafts, [7] * drafts))
            row.computed += count
        check(builder.build(spans), spans)
        if all(span.count == 1 and not span.drafts for span in spans):
            check(builder.build_one_each([span.row for span in spans], [span.start for span in spans]), spans)


def test_many_rows_of_one_token() -> None:
    """More than are filled one by one; and of the tokens that the device alone knows, nothing but their places."""
    builder = BatchBuilder(64, 40, MAX_LEN, SIZE, torch.device("cpu"))
    rows = [Row([n, *range(MAX_LEN)], [3 * n + i for i in range(1 + n % 3)]) for n in range(40)]
    for step in range(3):
        starts = [min(step + n % 9, len(row.blocks) * SIZE - 1) for n, row in enumerate(rows)]
        spans = [RowSpan(row, start, 1, 1) for row, start in zip(rows, starts, strict=True)]
        check(builder.build_one_each(rows, starts), spans)
        unknown = builder.build_one_each(rows, starts, known=False)
        assert unknown.slots.tolist() == spelled(spans)["slots"] and unknown.seq_lens.tolist() == spelled(spans)["seq_lens"]
        check(builder.build(spans), spans)


def test_a_token_that_only_the_device_knows_is_left_out() -> None:
    builder = BatchBuilder(16, 4, MAX_LEN, SIZE, torch.device("cpu"))
    spans = [RowSpan(Row([5, 6, 7], [1]), 3, 1, 1), RowSpan(Row([8, 9], [2]), 0, 2, 1)]
    check(builder.build(spans), spans)


def test_a_prefix_in_common_is_named_where_it_saves_enough() -> None:
    def shared(least: int, *rows: tuple[list[int], int]) -> int:
        builder = BatchBuilder(16, 4, MAX_LEN, SIZE, torch.device("cpu"), shared_prefix=least)
        batch = builder.build([RowSpan(Row(list(range(40)), blocks), start, 2, 1) for blocks, start in rows])
        assert (batch.shared is None) == (batch.shared_host == 0) == (builder.keys_saved == 0)
        assert batch.shared is None or batch.shared.tolist() == [batch.shared_host]
        assert builder.keys_saved == batch.shared_host * (len(rows) - 1)
        return batch.shared_host

    one, two, three = ([4, 5, 6, 7, *own] for own in ([1], [2], [3, 9]))
    assert shared(1, (one, 16), (two, 17), (three, 18)) == 16
    assert shared(32, (one, 16), (two, 17), (three, 18)) == 16
    assert shared(33, (one, 16), (two, 17), (three, 18)) == 0
    assert shared(0, (one, 16), (two, 17)) == 0
    assert shared(1, (one, 16)) == 0
    assert shared(1, (one, 16), (two, 11)) == 8  # the second computes tokens 11 and 12: what it shares is older
    assert shared(1, (one, 16), ([4, 5, 8, 7, 2], 16)) == 8
    assert shared(12, (one, 16), ([4, 5, 8, 7, 2], 16)) == 0
    assert shared(1, (one, 16), ([8, 5, 6, 7, 2], 16)) == 0


def test_a_batch_stands_until_the_next_but_one() -> None:
    builder = BatchBuilder(16, 4, MAX_LEN, SIZE, torch.device("cpu"))
    row = Row(list(range(20)), [3, 4, 5, 6, 7])
    spans = [[RowSpan(row, position, 1, 1)] for position in range(3)]
    first = builder.build(spans[0])
    second = builder.build(spans[1])
    check(first, spans[0])
    check(second, spans[1])
    builder.build(spans[2])
    check(second, spans[1])
