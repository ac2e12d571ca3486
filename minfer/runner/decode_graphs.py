"""CUDA graphs of decode steps: one a batch size, captured when that size first comes, replayed ever after.

A step of one token a request has some three hundred launches of microseconds each; without a graph the host takes longer to ask for them
than the GPU to do them. A graph fixes every address and every grid, so steps are copied into buffers that stay where they are, and the
number of requests is rounded up to a *bucket*:

    requests of the step     r0  r1  r2  |  -   -         bucket of 5
    token_ids, positions      t   t   t  |  0   0
    slots                     s   s   s  | -1  -1         written nowhere
    query_start            0  1   2   3  |  3   3         no query: attention leaves such a row before it reads anything
    seq_lens                  n   n   n  |  0   0

Where requests have LoRA adapters it is another graph, with the adapters' kernels in it; tiles that a step doesn't need say adapter 0. A
step without adapters has none of that.

Every other op works row by row, so what is in the rows of padding reaches no other row; their results are cut off. How often attention
splits the context is part of a grid, hence fixed for the longest context that the engine admits; a short one leaves splits empty.

Steps with anything but one token a request (prompts, drafts) are run as they come: there the GPU is the slower one.

What is captured lies in one memory pool for all buckets, because only one of them runs at a time: the next step may be launched while this
one runs (`EngineCore`), but the device begins it when this one is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minfer.batch import Batch, LoraRows
from minfer.runner.lora_rows import TILE_ROWS, most_tiles

Run = Callable[[], Sequence[torch.Tensor]]
Record = Callable[[Run], Run]  # runs the function once, and returns what does the same again into the same memory


class DecodeGraphs:
    """A `Graph` over any step. `record` is the device's way of capturing; on a CPU, in tests, anything that behaves like it."""

    def __init__(
        self,
        step: Callable[[Batch], Sequence[torch.Tensor]],
        device: torch.device,
        max_requests: int,
        max_len: int,
        block_size: int,
        record: Record | None = None,
        adapters: int = 0,
    ) -> None:
        self.step = step
        self.max_len = max_len
        self.buckets = _buckets(max_requests)
        self.replays = 0  # steps that came from a graph, so that a test or a metric can tell
        self._record = record or cuda_recorder()
        self._captured: dict[tuple[int, bool], Run] = {}  # by bucket, and whether rows have adapters
        self._adapters = adapters

        def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._token_ids, self._positions, self._seq_lens = (integers(max_requests) for _ in range(3))
        self._slots, self._logits_at = (integers(max_requests, dtype=torch.int64) for _ in range(2))
        self._query_start = integers(max_requests + 1)
        self._block_tables = integers(max_requests, -(-max_len // block_size))
        self._lora_rows = integers(max_requests if adapters else 0)
        self._lora_tiles = integers(most_tiles(max_requests, adapters) if adapters else 0, 3)

    @property
    def captured(self) -> list[int]:
        """The buckets that have a graph."""
        return sorted({bucket for bucket, _ in self._captured})

    def replay(self, batch: Batch) -> list[torch.Tensor]:
        """What the step returns, [T, ...] each, in memory that the next replay overwrites. A step that no graph serves is run as it is."""
        requests = batch.num_requests
        one_each = batch.num_tokens == requests and batch.query_lens_host.count(1) == requests
        if not one_each or requests > self.buckets[-1] or batch.tails is not None:
            return list(self.step(batch))
        bucket = next(size for size in self.buckets if size >= requests)
        self._fill(batch, bucket)
        which = bucket, batch.lora is not None
        if which not in self._captured:
            static = self._batch(bucket, adapted=which[1])
            self._captured[which] = self._record(lambda: self.step(static))
        self.replays += 1
        return [out[:requests] for out in self._captured[which]()]

    def _fill(self, batch: Batch, bucket: int) -> None:
        real, width = batch.num_requests, batch.block_tables.shape[1]
        for static, given in (
            (self._token_ids, batch.token_ids),
            (self._positions, batch.positions),
            (self._slots, batch.slots),
            (self._query_start, batch.query_start),
            (self._seq_lens, batch.seq_lens),
        ):
            static[: given.shape[0]].copy_(given)
        self._block_tables[:real, :width].copy_(batch.block_tables)
        if batch.lora is not None:
            rows, tiles = batch.lora.rows, batch.lora.tiles
            self._lora_rows[: rows.shape[0]].copy_(rows)
            self._lora_tiles[: tiles.shape[0]].copy_(tiles)
            self._lora_tiles[tiles.shape[0] : most_tiles(bucket, self._adapters)] = 0
        if real == bucket:
            return
        self._token_ids[real:bucket] = 0
        self._positions[real:bucket] = 0
        self._slots[real:bucket] = -1
        self._query_start[real + 1 : bucket + 1] = real
        self._seq_lens[real:bucket] = 0

    def _batch(self, bucket: int, adapted: bool) -> Batch:
        """Views of the buffers. The host's lists are what grids are made from: the longest there may be."""
        return Batch(
            token_ids=self._token_ids[:bucket],
            positions=self._positions[:bucket],
            slots=self._slots[:bucket],
            query_start=self._query_start[: bucket + 1],
            seq_lens=self._seq_lens[:bucket],
            block_tables=self._block_tables[:bucket],
            logits_at=self._logits_at[:bucket],
            query_lens_host=[1] * bucket,
            seq_lens_host=[self.max_len] * bucket,
            lora=self._lora(bucket) if adapted else None,
        )

    def _lora(self, bucket: int) -> LoraRows:
        return LoraRows(self._lora_rows[:bucket], self._lora_tiles[: most_tiles(bucket, self._adapters)], [], TILE_ROWS)


def cuda_recorder() -> Record:
    """Captures into CUDA graphs that share one memory pool."""
    pool = torch.cuda.graph_pool_handle()

    def record(run: Run) -> Run:
        run()  # compiles kernels and chooses algorithms, which a capture can't
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = run()

        def replay() -> Sequence[torch.Tensor]:
            graph.replay()
            return out

        return replay

    return record


def _buckets(largest: int) -> list[int]:
    """Fine where a request more is felt, coarse where it isn't."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 4096, 64)]
    return [size for size in sizes if size < largest] + [largest]
