"""`HeadRunner`: runs an EAGLE head over pairs of a token and a state; the only place that calls it.

On the CPU an EAGLE-3 layer is recorded like a model's step (`runner/graphs.py`): its products take microseconds, and the Python between
them would take longer. What a recorded step reads besides its batch must lie where it lay before, so what the layer reads is copied to
buffers of the largest size, of which only the rows in use are ever touched. On a GPU the layer is in CUDA graphs as a model's step is
(`runner/decode_graphs.py`), over the same buffers. Left out: recording EAGLE-1's layer on the CPU, which ends in an addition that is no op.
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
    """`embed`: ids[T] -> [T, H]. With `record`, the ops that the head computes with, its layer is recorded where they can be: by `graphs`,
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
        self._inputs: list[torch.Tensor] = []
        self._graph: Graph | None = None
        if record is not None and (graphs is not None or (isinstance(head, Eagle3Head) and can_capture(record))):
            device = cache.layers[0].k.device
            self._inputs = [torch.zeros(max_tokens, width, dtype=record.dtype, device=device) for width in head.input_widths]
            self._graph = capture(self._layer, record, max_tokens, max_requests) if graphs is None else graphs(self._layer)

    def _layer(self, batch: Batch) -> Sequence[torch.Tensor]:
        """The head over what is in the buffers."""
        return self._head(batch, self.cache, *(buffer[: batch.num_tokens] for buffer in self._inputs))  # type: ignore[no-any-return]

    def states(self, states: torch.Tensor) -> torch.Tensor:
        """The target's states of some tokens, side by side, [T, F * H] -> what the head takes for them, [T, H]."""
        return self._head.states(states)

    @torch.inference_mode()
    def run(self, spans: Sequence[RowSpan], state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """state[T, H] before each of the spans' tokens -> what to guess from, and the state that stands for it, of those tokens whose
        logits are wanted: [S, H] each, valid until the next run.
        """
        batch = self._builder.build(spans)
        inputs = self._head.inputs(self._embed(batch.token_ids), state)
        if self._graph is not None:
            for buffer, given in zip(self._inputs, inputs, strict=True):
                buffer[: len(given)] = given
            guesses, after = self._graph.replay(batch)
        else:
            guesses, after = self._head(batch, self.cache, *inputs)
        if batch.logits_at.shape[0] == guesses.shape[0]:
            return guesses, after
        return guesses.index_select(0, batch.logits_at), after.index_select(0, batch.logits_at)
