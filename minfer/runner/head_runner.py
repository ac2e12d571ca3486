"""`HeadRunner`: runs an EAGLE head over pairs of a token and a state; the only place that calls it.

On the CPU an EAGLE-3 pass is recorded like a model's step (`runner/graphs.py`), from the tokens' embeddings on: its products take
microseconds, and the Python between them would take longer. What a recorded step reads besides its batch must lie where it lay before, so
the states are copied to a buffer of the largest size, of which only the rows in use are ever touched. On a GPU the pass is in CUDA graphs
as a model's step is (`runner/decode_graphs.py`), over the same buffer. Left out: recording EAGLE-1's on the CPU, which concatenates and
adds by what are no ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minfer.batch import Batch
from minfer.kernels import Ops
from minfer.kvcache import KVCache
from minfer.models.eagle import Eagle3Head, EagleHead
from minfer.runner.batch_builder import BatchBuilder, RowSpan
from minfer.runner.graphs import Graph, Step, can_capture, capture


class HeadRunner:
    """`embed`: ids[T] -> [T, H]. With `record`, the ops that the head computes with, its pass is recorded where they can be: by `graphs`,
    where the device has a way of its own.

    `max_tokens`, `max_requests`: the most that `builder` takes in one batch.
    """

    def __init__(
        self,
        head: EagleHead | Eagle3Head,
        cache: KVCache,
        builder: BatchBuilder,
        embed: Callable[[torch.Tensor], torch.Tensor],
        max_tokens: int,
        max_requests: int,
        record: Ops | None = None,
        graphs: Callable[[Step], Graph] | None = None,
    ) -> None:
        self.cache = cache
        self._head, self._builder, self._embed = head, builder, embed
        self._graph: Graph | None = None
        if record is not None and (graphs is not None or (isinstance(head, Eagle3Head) and can_capture(record))):
            self._state = torch.zeros(max_tokens, head.config.hidden_size, dtype=record.dtype, device=cache.layers[0].k.device)
            self._graph = capture(self._recorded, record, max_tokens, max_requests) if graphs is None else graphs(self._recorded)

    def _pass(self, batch: Batch, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._head(batch, self.cache, self._embed(batch.token_ids), state)  # type: ignore[no-any-return]

    def _recorded(self, batch: Batch) -> Sequence[torch.Tensor]:
        """The pass over the state that is in the buffer."""
        return self._pass(batch, self._state[: batch.num_tokens])

    def states(self, states: torch.Tensor) -> torch.Tensor:
        """The target's states of some tokens, side by side, [T, F * H] -> what the head takes for them, [T, H]."""
        return self._head.states(states)

    def run(self, spans: Sequence[RowSpan], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """state[T, H] before each of the spans' tokens -> what to guess from, and the state that stands for it, of those tokens whose
        logits are wanted: [S, H] each, valid until the next run.
        """
        batch = self._builder.build(spans)
        if self._graph is not None:
            self._state[: len(state)] = state
            guesses, after = self._graph.replay(batch)
        else:
            guesses, after = self._pass(batch, state)
        if len(spans) == 1:
            return guesses[-1:], after[-1:]
        if batch.logits_at.shape[0] == guesses.shape[0]:
            return guesses, after
        return guesses.index_select(0, batch.logits_at), after.index_select(0, batch.logits_at)
