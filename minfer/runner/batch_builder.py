"""`BatchBuilder`: fills a `Batch` from the rows of a step.

The index tensors live in buffers allocated once for the largest step, and are filled through numpy views: at batch 1 a
fresh tensor per field would cost more than everything else the host does. On a GPU the host side is pinned and copied
asynchronously; on the CPU the batch is views of the buffers themselves. Two sets of buffers alternate, so that the next
step can be built while the previous one still runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from minfer.batch import Batch


class BatchRow(Protocol):
    """One request's part of a step, as much as the builder needs of it."""

    @property
    def token_ids(self) -> list[int]: ...  # the whole sequence
    @property
    def blocks(self) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Tokens `start : start + count` of a row followed by `drafts`; logits are wanted of the last `logits` of them.

    With `tail` it is one draft that branches off, at position `start`: where the drafts on its way lie, from the branching to
    itself, as numbers of the row's slots.
    """

    row: BatchRow
    start: int
    count: int
    logits: int
    drafts: Sequence[int] = ()
    tail: Sequence[int] = ()


class _Buffers:
    def __init__(self, max_tokens: int, max_requests: int, max_blocks: int, max_tail: int, device: torch.device) -> None:
        pin = device.type == "cuda"

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, pin_memory=pin)

        self.token_ids = buffer(max_tokens)
        self.positions = buffer(max_tokens)
        self.slots = buffer(max_tokens, dtype=torch.int64)
        self.query_start = buffer(max_requests + 1)
        self.seq_lens = buffer(max_requests)
        self.block_tables = buffer(max_requests, max_blocks)
        self.logits_at = buffer(max_tokens, dtype=torch.int64)
        self.tails = buffer(max_requests, 1 + max_tail, dtype=torch.int64)


class BatchBuilder:
    """`max_tail`: the most drafts on the way to one that branched off; each such draft is a row, and counts as a request here."""

    def __init__(self, max_tokens: int, max_requests: int, max_len: int, block_size: int, device: torch.device, max_tail: int = 0) -> None:
        self.block_size = block_size
        self.device = device
        max_blocks = -(-max_len // block_size)
        self._sets = [_Buffers(max_tokens, max_requests, max_blocks, max_tail, device) for _ in range(2)]
        self._numpy = [{name: tensor.numpy() for name, tensor in vars(s).items()} for s in self._sets]
        self._turn = 0

    def build(self, spans: Sequence[RowSpan]) -> Batch:
        """The spans' tokens as one batch. Valid until `build` has been called twice more."""
        self._turn = 1 - self._turn
        host, into = self._sets[self._turn], self._numpy[self._turn]
        size = self.block_size
        tokens = logits = blocks = 0
        query_lens, seq_lens = [], []
        for r, span in enumerate(spans):
            start, count, table = span.start, span.count, span.row.blocks
            end, here = start + count, tokens + count
            into["block_tables"][r, : len(table)] = table
            if count == 1:
                into["token_ids"][tokens] = span.drafts[0] if span.drafts else span.row.token_ids[start]
                into["positions"][tokens] = start
                at = span.tail[-1] if span.tail else start
                into["slots"][tokens] = table[at // size] * size + at % size
            else:
                into["token_ids"][tokens:here] = [*span.row.token_ids[start:end], *span.drafts]
                positions = np.arange(start, end)
                into["positions"][tokens:here] = positions
                into["slots"][tokens:here] = into["block_tables"][r][positions // size].astype(np.int64) * size + positions % size
            into["logits_at"][logits : logits + span.logits] = range(here - span.logits, here)
            into["query_start"][r + 1] = here
            into["seq_lens"][r] = end
            query_lens.append(count)
            seq_lens.append(end)
            blocks = max(blocks, len(table))
            tokens, logits = here, logits + span.logits
        requests, branched = len(spans), any(span.tail for span in spans)
        if branched:
            self._fill_tails(spans, into["tails"])
        return Batch(
            token_ids=self._send(host.token_ids[:tokens]),
            positions=self._send(host.positions[:tokens]),
            slots=self._send(host.slots[:tokens]),
            query_start=self._send(host.query_start[: requests + 1]),
            seq_lens=self._send(host.seq_lens[:requests]),
            block_tables=self._send(host.block_tables[:requests, :blocks]),
            logits_at=self._send(host.logits_at[:logits]),
            query_lens_host=query_lens,
            seq_lens_host=seq_lens,
            tails=self._send(host.tails[:requests]) if branched else None,
        )

    def _fill_tails(self, spans: Sequence[RowSpan], tails: np.ndarray) -> None:
        size = self.block_size
        for r, span in enumerate(spans):
            tails[r, 0] = span.start + 1 - len(span.tail) if span.tail else Batch.NO_TAIL
            for index, at in enumerate(span.tail, 1):
                tails[r, index] = span.row.blocks[at // size] * size + at % size

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)
