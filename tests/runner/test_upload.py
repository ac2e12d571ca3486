"""Uploaded batches are those that the host built; padded ones lie where the graph of their bucket looks, with nothing left over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernels.devices import DEVICE

from minfer.batch import Batch
from minfer.runner import BatchBuilder, RowSpan
from minfer.runner.buckets import Buckets
from minfer.runner.upload import copy_later

SIZES = (64, 8, 128, 16)  # tokens and requests of a batch, tokens of a sequence and of a block
FIELDS = ("token_ids", "positions", "slots", "query_start", "seq_lens", "block_tables", "logits_at")


@dataclass
class Row:
    token_ids: list[int]
    blocks: list[int]
    adapter: int = 0


def rows_of(lengths: list[int]) -> list[Row]:
    return [Row([100 * n + i for i in range(length)], [10 * n + i for i in range(-(-length // 16))]) for n, length in enumerate(lengths)]


def uploading() -> BatchBuilder:
    return BatchBuilder(*SIZES, DEVICE, 2, buckets=Buckets(8), copy=copy_later)


def same(uploaded: Batch, built: Batch) -> None:
    for name in FIELDS:
        ours, theirs = getattr(uploaded, name), getattr(built, name)
        assert ours.dtype == theirs.dtype and ours.device.type == DEVICE.type
        if name == "block_tables":  # may be wider
            ours = ours[:, : theirs.shape[1]]
        assert ours.tolist() == theirs.tolist(), name
        assert ours.data_ptr() % 16 == 0, "kernels take another way for addresses that 16 doesn't divide"
    assert (uploaded.query_lens_host, uploaded.seq_lens_host) == (built.query_lens_host, built.seq_lens_host)
    assert (uploaded.tails is None) == (built.tails is None)
    if uploaded.tails is not None and built.tails is not None:
        assert uploaded.tails.tolist() == built.tails.tolist()


def test_uploaded_steps_are_those_that_were_built() -> None:
    """Steps of one token each, prompts, and drafts that branch, of many shapes, one after the other."""
    ours, plain = uploading(), BatchBuilder(*SIZES, torch.device("cpu"), 2)
    for turn in range(12):
        rows = rows_of([20 + 5 * turn + n for n in range(1 + turn % 5)])
        starts = [len(row.token_ids) - 1 for row in rows]
        one_each = ours.build_one_each(rows, starts)
        same(one_each, plain.build_one_each(rows, starts))
        assert one_each.padded is not None
        spans = [RowSpan(row, 0, min(9, len(row.token_ids)), 2) for row in rows]
        mixed = ours.build(spans)
        same(mixed, plain.build(spans))
        assert mixed.padded is None
    (row,) = rows_of([71])
    spans = [RowSpan(row, 70, 3, 3, [7, 8]), RowSpan(row, 71, 1, 1, [9], [72])]
    branched = ours.build(spans)
    same(branched, plain.build(spans))
    assert branched.padded is None, "no graph knows branches"


def test_a_padded_step_lies_where_the_one_before_lay_and_nothing_of_it_is_left() -> None:
    """A step of four, then one of three in the same bucket: the fourth row must neither write nor read again."""
    builder = uploading()

    def step(lengths: list[int]) -> Batch:
        batch = builder.build_one_each(rows_of(lengths), [length - 1 for length in lengths])
        assert batch.padded is not None
        return batch.padded

    first = step([20, 30, 40, 50])
    addresses = {name: getattr(first, name).data_ptr() for name in FIELDS}
    for _ in range(2):  # both pieces of the host's memory
        step([100] * 8)
        padded = step([21, 31, 41])
        assert padded is first and {name: getattr(padded, name).data_ptr() for name in FIELDS} == addresses
        assert padded.seq_lens.tolist() == [21, 31, 41, 0]
        assert padded.slots[3].item() == -1
        assert padded.query_start.tolist() == [0, 1, 2, 3, 3]
        assert padded.block_tables.shape == (4, 8)
        assert [row[:2] for row in padded.block_tables[:3].tolist()] == [[0, 1], [10, 11], [20, 21]]
        assert padded.query_lens_host == [1] * 4 and padded.seq_lens_host == [128] * 4


def test_rows_with_adapters_are_another_step_to_a_graph() -> None:
    """Adapters come and go between steps of one bucket; the tiles that a step has over say adapter 0."""
    ours = BatchBuilder(*SIZES, DEVICE, adapters=3, buckets=Buckets(8), copy=copy_later)
    plain = BatchBuilder(*SIZES, torch.device("cpu"), adapters=3)
    padded: list[Batch] = []
    for adapters in ([1, 3, 1], [0, 0, 0], [2, 0, 2], [1, 2, 3, 1]):
        rows = rows_of([20 + n for n in range(len(adapters))])
        for row, adapter in zip(rows, adapters, strict=True):
            row.adapter = adapter
        starts = [len(row.token_ids) - 1 for row in rows]
        batch, expected = ours.build_one_each(rows, starts), plain.build_one_each(rows, starts)
        same(batch, expected)
        assert (batch.lora is None) == (expected.lora is None) == (not any(adapters))
        assert batch.padded is not None
        padded.append(batch.padded)
        if batch.lora is not None and expected.lora is not None and batch.padded.lora is not None:
            assert batch.lora.rows.tolist() == expected.lora.rows.tolist() and batch.lora.groups == expected.lora.groups
            tiles = expected.lora.tiles.tolist()
            assert batch.lora.tiles.tolist() == tiles
            assert batch.padded.lora.tiles.tolist() == tiles + [[0, 0, 0]] * (3 - len(tiles))
    assert padded[0] is padded[2] is padded[3] and padded[1] is not padded[0] and padded[1].lora is None


def test_a_padded_step_with_drafts_has_its_rows_together_and_belongs_to_nobody_behind_them() -> None:
    """First a step that fills the bucket, whose leftovers would show."""
    builder = BatchBuilder(*SIZES, DEVICE, 2, buckets=Buckets(8, 4), copy=copy_later)

    def step(counts: list[int]) -> Batch:
        rows = rows_of([30 + n for n in range(len(counts))])
        batch = builder.build([RowSpan(row, 20, count, count) for row, count in zip(rows, counts, strict=True)])
        assert batch.padded is not None
        return batch.padded

    first = step([4, 2, 1, 1])
    addresses = {name: getattr(first, name).data_ptr() for name in FIELDS}
    padded = step([1, 3, 1])
    assert padded is first and {name: getattr(padded, name).data_ptr() for name in FIELDS} == addresses
    assert padded.query_start.tolist() == [0, 1, 4, 5, 5]
    assert padded.seq_lens.tolist() == [21, 23, 21, 0]
    assert padded.positions.tolist() == [20, 20, 21, 22, 20, 0, 0, 0]
    assert padded.slots.tolist() == [20, 180, 181, 182, 340, -1, -1, -1]
    assert padded.query_lens_host == [4] * 4 and padded.seq_lens_host == [128] * 4


def test_rows_of_drafts_with_adapters_fit_the_tiles_of_their_graph() -> None:
    """Twenty rows of one adapter: two tiles of the sixteen rows that a graph's kernels take, not one of a prompt's."""
    builder = BatchBuilder(*SIZES, DEVICE, adapters=3, buckets=Buckets(8, 4), copy=copy_later)
    rows = rows_of([30] * 6)
    for row, adapter in zip(rows, (2, 2, 2, 2, 2, 1), strict=True):
        row.adapter = adapter
    batch = builder.build([RowSpan(row, 20, 4, 4) for row in rows])
    assert batch.padded is not None and batch.padded.lora is not None
    tiles = batch.padded.lora.tiles.tolist()
    assert tiles == [[1, 0, 4], [2, 4, 16], [2, 20, 4]] + [[0, 0, 0]] * (len(tiles) - 3)
    assert batch.padded.lora.tile_rows == 16
