"""An engine that does what the environment variable FAKE says: behave, crash, hang, lie. Runs inside a worker, like a real one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from compare.engines.base import Adapter, EngineInfo, Recorder, run_batches, run_one_by_one, run_steps
from compare.protocol import LoadOptions, Request, Trace

INFO = EngineInfo(
    name="fake",
    title="a fake engine",
    url="",
    precisions={"cpu": ("bf16",)},
    batching="continuous",
    scores=True,
    modules=("json",),
    adapter="Fake",
)
STEP = 0.002


class Fake(Adapter):
    info = INFO

    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        print("an engine that chats on stdout must not break the protocol")
        self.kind = os.environ.get("FAKE", "good")
        if self.kind == "crash-load":
            os.abort()
        return {"version": "1", "flags": self.kind, "weight_bytes": 1000}

    def generate(self, recorder: Recorder) -> None:
        if self.kind == "crash":
            os.kill(os.getpid(), 9)
        if self.kind == "hang":
            time.sleep(600)
        if self.kind == "error":
            raise ValueError("the fake engine refuses")
        if self.kind == "static":
            run_batches(recorder, 2, lambda batch: self._batch(recorder, batch))
        elif self.kind == "single":
            run_one_by_one(recorder, lambda i, r: self._one(recorder, i, r))
        else:
            self._continuous(recorder)
        self._lie(recorder.traces)

    def _continuous(self, recorder: Recorder) -> None:
        left: dict[int, int] = {}

        def add(index: int, request: Request) -> None:
            left[index] = request.max_tokens

        def step() -> bool:
            time.sleep(STEP)
            for index in list(left):
                recorder.token(index, 7)
                left[index] -= 1
                if not left[index]:
                    del left[index]
            return bool(left)

        run_steps(recorder, add, step)

    def _batch(self, recorder: Recorder, batch: list[int]) -> None:
        for _ in range(recorder.requests[batch[0]].max_tokens):
            time.sleep(STEP)
            for index in batch:
                recorder.token(index, 7)

    def _one(self, recorder: Recorder, index: int, request: Request) -> None:
        for _ in range(request.max_tokens):
            time.sleep(STEP)
            recorder.token(index, 7)

    def _lie(self, traces: list[Trace]) -> None:
        first = traces[0]
        if self.kind == "lie-early":  # claims to have answered before it was asked
            first.times = [t - 10 for t in first.times]
        if self.kind == "lie-late":
            first.times = [t + 1000 for t in first.times]
        if self.kind == "lie-more":
            first.token_ids, first.times = first.token_ids * 2, first.times + first.times
        if self.kind == "lie-fewer":
            first.token_ids, first.times = first.token_ids[:1], first.times[:1]
        if self.kind == "lie-backwards":
            first.times = first.times[::-1]
        if self.kind == "lie-vocabulary":
            first.token_ids = [10**6] * len(first.token_ids)
        if self.kind == "lie-missing":
            traces.pop()

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        return [[-1.0] * (len(w) - 1) for w in windows]
