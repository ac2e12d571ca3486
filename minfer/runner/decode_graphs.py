"""CUDA graphs of decode steps, with drafts and without: one a bucket, captured when it first comes, replayed ever after.

A step of a few rows has some three hundred launches of microseconds each; without a graph the host takes longer to ask for them
than the GPU to do them. A graph fixes every address and every grid, so what it is captured over is a step that always lies in the same
place and has a round number of rows and requests (`buckets.py`), padding behind those of the step: `Batch.padded`, which `upload.py` makes.

Every op but attention works row by row, so what is in the rows of padding reaches no other row; their results are cut off. How often
attention splits the context is part of a grid, hence fixed for the longest context that the engine admits; a short one leaves splits empty.
A step that names a shared prefix (`Batch.shared`) has more launches, hence a graph of its own; how long the prefix is, the device reads.
One with drafts that branch (`Batch.tails`) or LoRA adapters has other kernels, hence a graph of its own, too.

Steps with more tokens of one request than a draft has (prompts) are run as they come: there the GPU is the slower one.

What is captured lies in one memory pool for all buckets, because only one of them runs at a time: the next step may be launched while this
one runs (`EngineCore`), but the device begins it when this one is done. What a graph returns must outlive the capture of others, so it has
no part in that. For a row a request it is little, but with drafts there are many buckets of many rows, each with its inner states: so all
of these hand their results over in the same memory (`most_tokens` rows), which costs each replay a copy on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minfer.batch import Batch
from minfer.runner.graphs import Step

Run = Callable[[], Sequence[torch.Tensor]]
Record = Callable[[Run], Run]  # runs the function once, and returns what does the same again into the same memory


class DecodeGraphs:
    """A `Graph` over any step. `record` is the device's way of capturing; on a CPU, in tests, anything that behaves like it.

    `most_tokens`: of a bucket with drafts, if there are any.
    """

    def __init__(self, step: Step, record: Record | None = None, *, most_tokens: int = 0) -> None:
        self.step = step
        self.replays = 0  # steps that came from a graph, so that a test or a metric can tell
        self._record = record or cuda_recorder()
        self._most_tokens = most_tokens
        self._captured: dict[tuple[int, int, int, bool, bool, bool], Run] = {}
        self._results: list[torch.Tensor] = []  # of steps with drafts

    @property
    def captured(self) -> list[tuple[int, int]]:
        """The numbers of tokens and requests, padding included, that have a graph."""
        return sorted({(tokens, requests) for tokens, requests, *_ in self._captured})

    def replay(self, batch: Batch) -> list[torch.Tensor]:
        """What the step returns, [T, ...] each, in memory that the next replay overwrites. A step that no graph serves is run as it is."""
        padded = batch.padded
        if padded is None:
            return list(self.step(batch))
        longest = padded.query_lens_host[0]
        kind = padded.lora is not None, padded.shared is not None, padded.tails is not None
        which = padded.num_tokens, padded.num_requests, longest, *kind
        if which not in self._captured:
            run = self.step if longest == 1 else self._hand_over
            self._captured[which] = self._record(lambda: run(padded))
        self.replays += 1
        return [out[: batch.num_tokens] for out in self._captured[which]()]

    def _hand_over(self, padded: Batch) -> Sequence[torch.Tensor]:
        results = self.step(padded)
        if not self._results:  # `record` runs the step once before it captures
            self._results = [out.new_empty((self._most_tokens, *out.shape[1:])) for out in results]
        return [shared[: len(out)].copy_(out) for shared, out in zip(self._results, results, strict=True)]


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
