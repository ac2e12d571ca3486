"""CUDA graphs of decode steps: one a batch size, captured when that size first comes, replayed ever after.

A step of one token a request has some three hundred launches of microseconds each; without a graph the host takes longer to ask for them
than the GPU to do them. A graph fixes every address and every grid, so what it is captured over is a step that always lies in the same
place and has a round number of requests, with rows of padding behind those of the step: `Batch.padded`, which `upload.py` makes.

Every op but attention works row by row, so what is in the rows of padding reaches no other row; their results are cut off. How often
attention splits the context is part of a grid, hence fixed for the longest context that the engine admits; a short one leaves splits empty.
A step that names a shared prefix (`Batch.shared`) has more launches, hence a graph of its own; how long the prefix is, the device reads.

Steps with anything but one token a request (prompts, drafts) are run as they come: there the GPU is the slower one.

What is captured lies in one memory pool for all buckets, because only one of them runs at a time: the next step may be launched while this
one runs (`EngineCore`), but the device begins it when this one is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from minfer.batch import Batch

Run = Callable[[], Sequence[torch.Tensor]]
Record = Callable[[Run], Run]  # runs the function once, and returns what does the same again into the same memory


class DecodeGraphs:
    """A `Graph` over any step. `record` is the device's way of capturing; on a CPU, in tests, anything that behaves like it."""

    def __init__(self, step: Callable[[Batch], Sequence[torch.Tensor]], record: Record | None = None) -> None:
        self.step = step
        self.replays = 0  # steps that came from a graph, so that a test or a metric can tell
        self._record = record or cuda_recorder()
        self._captured: dict[tuple[int, bool, bool], Run] = {}  # by requests, whether rows have LoRA adapters, whether a prefix is shared

    @property
    def captured(self) -> list[int]:
        """The numbers of requests, padding included, that have a graph."""
        return sorted({requests for requests, *_ in self._captured})

    def replay(self, batch: Batch) -> list[torch.Tensor]:
        """What the step returns, [T, ...] each, in memory that the next replay overwrites. A step that no graph serves is run as it is."""
        padded = batch.padded
        if padded is None:
            return list(self.step(batch))
        which = padded.num_requests, padded.lora is not None, padded.shared is not None
        if which not in self._captured:
            self._captured[which] = self._record(lambda: self.step(padded))
        self.replays += 1
        return [out[: batch.num_requests] for out in self._captured[which]()]


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
