"""`ModelRunner`: takes the rows of a step, builds the batch, runs the model. The only place that calls it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minfer.batch import Batch
from minfer.kvcache import KVCache
from minfer.models import Model
from minfer.runner.batch_builder import BatchBuilder, BatchRow, RowSpan
from minfer.runner.graphs import Graph
from minfer.runner.upload import Copy


@dataclass(frozen=True, slots=True)
class Newest:
    """Tokens that only the device knows, because the step that draws them has not been waited for.

    Token `at[i]` of the batch is `tokens[rows[i]]`; None where the batch is those tokens, in their order.
    """

    tokens: torch.Tensor  # [S] int64
    at: list[int] | None = None
    rows: list[int] | None = None

    def put(self, token_ids: torch.Tensor, copy: Copy) -> None:
        """Into a batch's [T]."""
        if self.at is None:
            copy(token_ids, self.tokens)
        elif self.at:
            at, rows = torch.tensor([self.at, self.rows]).to(token_ids.device, non_blocking=True)
            token_ids[at] = self.tokens[rows].to(token_ids.dtype)


class ModelRunner:
    """With a `graph`, steps are replayed from it; without, the model's own Python runs each time.

    `after` names inner states that somebody wants to see (`Model.forward_states`); a graph must have been captured with the same.
    """

    def __init__(self, model: Model, cache: KVCache, builder: BatchBuilder, graph: Graph | None = None, after: Sequence[int] = ()) -> None:
        self.model = model
        self.cache = cache
        self.builder = builder
        self.graph = graph
        self.after = after
        self.states: list[torch.Tensor] = []  # of the last step, one [T, H] for each of `after`; valid until the next
        self.positions = torch.empty(0, dtype=torch.int32)  # of its tokens, [T], on the device; valid as long
        self.build_seconds = 0.0  # spent so far on turning rows into batches: the host's cost, not the model's

    @torch.inference_mode()
    def run(self, spans: Sequence[RowSpan], copies: Sequence[tuple[int, int]] = (), newest: Newest | None = None) -> torch.Tensor:
        """Computes the spans' tokens and writes their KV. Returns the final hidden states of the tokens whose logits are
        wanted, in order: [S, H]. Blocks in `copies` are copied (from, to) first; `newest` brings tokens that the spans lack.
        """
        self.cache.copy_blocks(copies)
        started = time.perf_counter()
        return self._run(self.builder.build(spans), newest, started)

    def run_one_each(self, rows: Sequence[BatchRow], starts: list[int], newest: Newest | None = None) -> torch.Tensor:
        """`run` of one token of each row, the one at `starts[r]`, with its logits: the decode step. To be called in inference mode."""
        started = time.perf_counter()
        known = newest is None or newest.at is not None
        return self._run(self.builder.build_one_each(rows, starts, known=known), newest, started)

    def _run(self, batch: Batch, newest: Newest | None, started: float) -> torch.Tensor:
        if newest is not None:
            newest.put(batch.token_ids, self.builder.copy)
        self.build_seconds += time.perf_counter() - started
        outputs = self.graph.replay(batch) if self.graph is not None else self.model.forward_states(batch, self.cache, self.after)
        hidden, self.states = outputs[0], outputs[1:]  # [T, H] each
        self.positions = batch.positions
        if batch.logits_at.shape[0] == hidden.shape[0]:
            return hidden
        return hidden.index_select(0, batch.logits_at)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden[S, H] -> [S, V] float32."""
        return self.model.compute_logits(hidden)
