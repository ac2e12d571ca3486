"""`BatchBuilder`: fills a `Batch` from the rows of a step.

The index tensors live in buffers allocated once for the largest step, and are filled through numpy views: at batch 1 a
fresh tensor per field would cost more than everything else the host does. On the CPU the batch is views of the buffers themselves; on a
GPU they are copied there in one piece (`upload.py`). Two sets of buffers alternate, so that the next step can be built while the
previous one still runs.

From step to step little changes: a request's blocks are those of the step before, and one more now and then. So a row of the table
is written only where it isn't that, the Python loop over the rows gathers their tokens, and the rest is arithmetic on arrays.

Most steps are of one token a request, with its logits. `build_one_each` says the same of them as `build`, and has less to ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from minfer.batch import Batch, LoraRows
from minfer.runner.buckets import Buckets
from minfer.runner.lora_rows import LoraBuffers
from minfer.runner.upload import Copy, Upload, copy_later

_Ints = NDArray[np.int64]
FEW = 8
WIDTH = 16
SHAPES = 16  # of batches, whose views are kept: with drafts they take turns


class BatchRow(Protocol):
    """One request's part of a step, as much as the builder needs of it."""

    @property
    def token_ids(self) -> list[int]: ...  # the whole sequence
    @property
    def blocks(self) -> list[int]: ...  # it may grow in place; where anything else changes, it has to be a new list
    @property
    def adapter(self) -> int: ...  # number of its LoRA adapter, from 1; 0: none


@dataclass(slots=True)
class RowSpan:
    """Tokens `start : start + count` of a row followed by `drafts`; logits are wanted of the last `logits` of them.

    A row that has one token less is waiting for it: only the device knows it so far, and `ModelRunner.run` is told where it is. With
    `tail` it is one draft that branches off, at position `start`: where the drafts on its way lie, from the branching to itself, as
    numbers of the row's slots.
    """

    row: BatchRow
    start: int
    count: int
    logits: int
    drafts: Sequence[int] = ()
    tail: Sequence[int] = ()


class _Buffers:
    """The host's side of a batch: tensors, the same memory as arrays, and what is known of its contents."""

    def __init__(self, max_tokens: int, max_requests: int, max_blocks: int, max_tail: int, adapters: int) -> None:
        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype)

        self.tensors = {
            "token_ids": buffer(max_tokens),
            "positions": buffer(max_tokens),
            "slots": buffer(max_tokens, dtype=torch.int64),
            "query_start": buffer(max_requests + 1),
            "seq_lens": buffer(max_requests),
            "block_tables": buffer(max_requests, max_blocks),
            "logits_at": buffer(max_tokens, dtype=torch.int64),
            "tails": buffer(max_requests, 1 + max_tail, dtype=torch.int64),
            "shared": buffer(1),
        }
        self.lora = LoraBuffers.empty(max_tokens, adapters) if adapters else None
        self.arrays = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        self.tables: list[list[int]] = [[] for _ in range(max_requests)]  # whose blocks each row of block_tables holds
        self.filled = [0] * max_requests  # and how many of them
        self._views: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}

    def write_table(self, row: int, table: list[int]) -> None:
        begin = self.filled[row] if table is self.tables[row] else 0
        self.arrays["block_tables"][row, begin : len(table)] = table[begin:]
        self.tables[row], self.filled[row] = table, len(table)

    def views(self, tokens: int, requests: int, blocks: int, logits: int, shared: int) -> dict[str, torch.Tensor]:
        """The beginnings of the tensors that hold so much; the same objects for the last few shapes of a batch."""
        self.arrays["shared"][0] = shared
        sizes = (tokens, requests, blocks, logits, min(shared, 1))
        known = self._views.get(sizes)
        if known is not None:
            return known
        lengths = {"token_ids": tokens, "positions": tokens, "slots": tokens, "seq_lens": requests, "logits_at": logits}
        views = {name: self.tensors[name][:length] for name, length in lengths.items()}
        views["query_start"] = self.tensors["query_start"][: requests + 1]
        views["block_tables"] = self.tensors["block_tables"][:requests, :blocks]
        if shared:
            views["shared"] = self.tensors["shared"]
        if len(self._views) == SHAPES:
            del self._views[next(iter(self._views))]
        self._views[sizes] = views
        return views


class BatchBuilder:
    """`max_tail`: the most drafts on the way to one that branched off; each such draft is a row, and counts as a request here.

    `adapters`: how many the model has; where it has none, those of the rows are another model's, and of no interest. `buckets` and `copy`:
    see `Upload`. With a `copy` there is one on any device. `shared_prefix`: a batch names the prefix that all of its rows share where that
    saves reading at least so many keys; 0: never.
    """

    def __init__(
        self,
        max_tokens: int,
        max_requests: int,
        max_len: int,
        block_size: int,
        device: torch.device,
        max_tail: int = 0,
        adapters: int = 0,
        buckets: Buckets | None = None,
        copy: Copy | None = None,
        shared_prefix: int = 0,
    ) -> None:
        self.block_size = block_size
        self.shared_prefix = shared_prefix
        self.keys_saved = 0  # that attention, in each layer, needn't read again thanks to shared prefixes
        self._max_blocks = max_blocks = -(-max_len // block_size)
        self._sets = [_Buffers(max_tokens, max_requests, max_blocks, max_tail, adapters) for _ in range(2)]
        self.copy = copy or copy_later
        uploads = device.type != "cpu" or copy is not None
        largest = (self._sets[0].tensors, self._sets[0].lora)
        self._upload = Upload(*largest, max_len, device, adapters, buckets, self.copy) if uploads else None
        self._few = 1 if buckets is None else buckets.longest  # tokens of a request in steps that graphs serve
        self._numbers = np.arange(max(max_tokens, max_requests) + 1)  # 0 1 2 ..
        self._turn = 0

    def build(self, spans: Sequence[RowSpan]) -> Batch:
        """The spans' tokens as one batch. Valid until two more have been built."""
        host = self._other_set()
        tables, filled = host.tables, host.filled
        tokens: list[int] = []
        total = widest = 0
        for r, span in enumerate(spans):
            row, start, count = span.row, span.start, span.count
            blocks = row.blocks
            width = len(blocks)
            if blocks is not tables[r] or width != filled[r]:
                host.write_table(r, blocks)
            if width > widest:
                widest = width
            tokens += row.token_ids[start : start + count]
            if span.drafts:
                tokens += span.drafts
            total += count
            if len(tokens) < total:
                tokens.append(0)
        query_lens, seq_lens = [span.count for span in spans], [span.start + span.count for span in spans]
        if total <= 2 * FEW:
            num_logits = self._fill_few(host, tokens, [(span.row, span.start, span.count, span.logits) for span in spans])
        else:
            starts, counts, logits = (np.array(values) for values in zip(*((s.start, s.count, s.logits) for s in spans), strict=True))
            num_logits = self._fill(host, tokens, starts, counts, logits)
        shared = self._shared(host, [span.start for span in spans]) if self.shared_prefix else 0
        views = host.views(total, len(spans), self._width(widest), num_logits, shared)
        if any(span.tail for span in spans):
            self._fill_tails(host, spans)
            views = {**views, "tails": host.tensors["tails"][: len(spans)]}
        lora = None if host.lora is None else self._lora(host.lora, [span.row for span in spans], query_lens)
        return self._batch(views, query_lens, seq_lens, lora, shared)

    def build_one_each(self, rows: Sequence[BatchRow], starts: list[int], *, known: bool = True) -> Batch:
        """`build` of one token of each row, the one at `starts[r]`, with its logits. Not `known`: the device has all of these tokens."""
        host = self._other_set()
        widest = 0
        for r, (row, table, written) in enumerate(zip(rows, host.tables, host.filled, strict=False)):
            blocks = row.blocks
            width = len(blocks)
            if blocks is not table or width != written:
                host.write_table(r, blocks)
            if width > widest:
                widest = width
        count = len(starts)
        tokens = [0] * count
        if known:
            tokens = [row.token_ids[start] if start < len(row.token_ids) else 0 for row, start in zip(rows, starts, strict=True)]
        if count <= FEW:
            self._fill_few(host, tokens, [(row, start, 1, 1) for row, start in zip(rows, starts, strict=True)])
        else:
            self._fill_one_each(host, tokens if known else None, np.array(starts))
        shared = self._shared(host, starts) if self.shared_prefix else 0
        views, query_lens = host.views(count, count, self._width(widest), count, shared), [1] * count
        lora = None if host.lora is None else self._lora(host.lora, rows, query_lens)
        return self._batch(views, query_lens, [start + 1 for start in starts], lora, shared, one_each=True)

    def _width(self, blocks: int) -> int:
        """How many columns of the block tables a batch shows. On a GPU it keeps its shape for longer: laying it out anew costs
        the host what a step does.
        """
        return blocks if self._upload is None else min(-(-blocks // WIDTH) * WIDTH, self._max_blocks)

    def _other_set(self) -> _Buffers:
        self._turn = 1 - self._turn
        return self._sets[self._turn]

    def _lora(self, buffers: LoraBuffers, rows: Sequence[BatchRow], counts: list[int]) -> LoraRows | None:
        """Which tokens go through which adapter; None where nobody asks for one."""
        adapters = [row.adapter for row in rows]
        return buffers.fill(adapters, counts, self._few) if any(adapters) else None

    def _batch(
        self,
        views: dict[str, torch.Tensor],
        query_lens: list[int],
        seq_lens: list[int],
        lora: LoraRows | None,
        shared: int,
        *,
        one_each: bool = False,
    ) -> Batch:
        self.keys_saved += shared * (len(seq_lens) - 1)
        if self._upload is not None:
            return self._upload.send(views, query_lens, seq_lens, lora, shared, one_each=one_each)
        return Batch(**views, query_lens_host=query_lens, seq_lens_host=seq_lens, shared_host=shared, lora=lora, padded=None)

    def _fill_few(self, host: _Buffers, tokens: list[int], spans: Sequence[tuple[BatchRow, int, int, int]]) -> int:
        """`_fill` of spans (row, start, count, logits) of a few tokens together: less work than operations on arrays are, however short."""
        into, size = host.arrays, self.block_size
        at = wanted = 0
        for r, (row, start, count, logits) in enumerate(spans, 1):
            for position in range(start, start + count):
                into["token_ids"][at], into["positions"][at] = tokens[at], position
                into["slots"][at] = row.blocks[position // size] * size + position % size
                at += 1
            into["query_start"][r], into["seq_lens"][r - 1] = at, start + count
            for index in range(at - logits, at):
                into["logits_at"][wanted] = index
                wanted += 1
        return wanted

    def _fill_one_each(self, host: _Buffers, tokens: list[int] | None, starts: _Ints) -> None:
        """`_fill` where each row has one token, and its logits are wanted."""
        into, size, count = host.arrays, self.block_size, len(starts)
        columns, offsets = np.divmod(starts, size)
        if tokens is not None:
            into["token_ids"][:count] = tokens
        into["positions"][:count] = starts
        into["slots"][:count] = into["block_tables"][self._numbers[:count], columns].astype(np.int64) * size + offsets
        into["query_start"][1 : count + 1] = self._numbers[1 : count + 1]
        into["seq_lens"][:count] = starts + 1
        into["logits_at"][:count] = self._numbers[:count]

    def _fill(self, host: _Buffers, tokens: list[int], starts: _Ints, counts: _Ints, logits: _Ints) -> int:
        """Writes all but the block tables, which are there already. Returns how many tokens' logits are wanted."""
        into, size = host.arrays, self.block_size
        total, requests = len(tokens), len(starts)
        ends = counts.cumsum()
        rows, positions = self._numbers[:requests], starts
        if total != requests:  # else each has one token
            rows = rows.repeat(counts)
            positions = self._numbers[:total] - (ends - counts - starts).repeat(counts)
        blocks = into["block_tables"][rows, positions // size].astype(np.int64)
        into["token_ids"][:total] = tokens
        into["positions"][:total] = positions
        into["slots"][:total] = blocks * size + positions % size
        into["query_start"][1 : requests + 1] = ends
        into["seq_lens"][:requests] = starts + counts
        wanted = logits.cumsum()
        num_logits = int(wanted[-1])
        into["logits_at"][:num_logits] = self._numbers[:num_logits] + (ends - wanted).repeat(logits)
        return num_logits

    def _shared(self, host: _Buffers, starts: list[int]) -> int:
        """Leading tokens in blocks that all rows have, computed before this step; 0 where they are too few."""
        size, rows = self.block_size, len(starts)
        if rows < 2:
            return 0
        whole, needed = min(starts) // size, -(-self.shared_prefix // ((rows - 1) * size))
        tables = host.arrays["block_tables"][:rows, :whole]
        if whole < needed or any((tables[:, at] != tables[0, at]).any() for at in (0, needed - 1)):
            return 0  # most batches are told by a column or two
        same = (tables == tables[0]).all(axis=0)
        blocks = whole if same.all() else int(same.argmin())
        return blocks * size if blocks >= needed else 0

    def _fill_tails(self, host: _Buffers, spans: Sequence[RowSpan]) -> None:
        """Where the keys of drafts that branch off lie; their own go to the last of those slots."""
        size, tails, end = self.block_size, host.arrays["tails"], 0
        for r, span in enumerate(spans):
            end += span.count
            tails[r, 0] = span.start + 1 - len(span.tail) if span.tail else Batch.NO_TAIL
            for index, at in enumerate(span.tail, 1):
                tails[r, index] = span.row.blocks[at // size] * size + at % size
            if span.tail:
                host.arrays["slots"][end - 1] = tails[r, len(span.tail)]
