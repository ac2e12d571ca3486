"""What an engine must be able to do to take part: `EngineInfo` (said before anything is installed) and `Adapter` (run inside).

An adapter file imports its engine only inside methods, so that the parent can read its `INFO` without having it. Three
drivers cover the field: `run_steps` for engines with a step loop (continuous batching), `run_batches` for engines that take
a whole batch and give it back, `run_one_by_one` for those that hold a single sequence. All three honour arrival times; the
difference in what they can do with them is a real difference between engines, and is what `serving` measures.

Standard library only: this file runs in every engine's environment.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from compare.protocol import LoadOptions, Request, Trace

Batching = Literal["continuous", "static", "single"]


@dataclass(frozen=True)
class Install:
    """One pip call. `requirements_of`: install what that package (already there, by --no-deps) asks for, minus `without`.

    remove: uninstall these afterwards (a torchvision that was built against another torch breaks every import of transformers).
    """

    packages: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    no_deps: bool = False
    requirements_of: str | None = None
    without: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class EngineInfo:
    """An engine's row. Everything here is known without installing it.

    precisions: of the weights, by device. setting: the recommended fastest setting that the adapter uses, in words.
    reason: why it can't run, where it can't (the actual error, if it was tried). modules: what must be importable.
    """

    name: str
    title: str
    url: str
    setting: str = ""
    precisions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    batching: Batching = "single"
    scores: bool = False
    prefix_caching: bool = False
    ids: bool = True  # False: a server that answers in text, so which token ids came back is unknown
    install: dict[str, tuple[Install, ...]] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    adapter: str = ""  # the class in the file of the engine's name; none: a row of the list only
    reason: str = ""
    server: bool = False  # runs as a server of its own, measured through `openai`
    preload: tuple[str, ...] = ()  # libraries for LD_PRELOAD, as paths inside its environment; those that are there are used
    min_python: tuple[int, int] = (3, 10)

    def devices(self) -> tuple[str, ...]:
        return tuple(self.precisions)


class Recorder:
    """The clock of one run, and the traces it fills. Starts when built."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.traces = [Trace(r.arrival, len(r.token_ids)) for r in requests]
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def token(self, index: int, token_id: int) -> None:
        """Stamps one token of request `index` with the present time."""
        trace = self.traces[index]
        trace.token_ids.append(token_id)
        trace.times.append(self.now())

    def tokens(self, index: int, token_ids: Iterable[int]) -> None:
        now, trace = self.now(), self.traces[index]
        for token_id in token_ids:
            trace.token_ids.append(token_id)
            trace.times.append(now)

    def wait_until(self, arrival: float) -> None:
        while (left := arrival - self.now()) > 0:
            time.sleep(left)


class Adapter(ABC):
    """One engine, inside its own process. `load` is called once; then any number of the others, in any order."""

    info: ClassVar[EngineInfo]

    @classmethod
    def prepare(cls, weights: Path, precision: str, out: Path) -> None:
        """Writes the engine's own form of the HF folder `weights` into the empty folder `out`.

        Left alone, the engine reads the HF folder itself.
        """
        (out / "source").symlink_to(weights, target_is_directory=True)

    @abstractmethod
    def load(self, model: Path, options: LoadOptions) -> dict[str, Any]:
        """Loads what `prepare` wrote. Returns what the report should say: `version`, `flags`, and `weight_bytes` if known better."""

    @abstractmethod
    def generate(self, recorder: Recorder) -> None:
        """Runs `recorder.requests`, greedy, stamping every token."""

    def score(self, windows: list[list[int]]) -> list[list[float]]:
        """For each window, ln p(token i | tokens before it) for i = 1..n-1."""
        raise NotImplementedError(f"{self.info.name} gives no log-probabilities of a prompt")

    def next_logprobs(self, contexts: list[list[int]], top: int) -> list[dict[int, float]]:
        """For each context, the `top` most likely next tokens and their ln p, before any sampling parameter."""
        raise NotImplementedError(f"{self.info.name} gives no log-probabilities of the next token")

    def device_memory(self) -> int | None:
        """Peak bytes on the accelerator, or None where there is none."""
        return None


def source(model: Path) -> Path:
    """The HF folder behind a model that needed no conversion."""
    return (model / "source").resolve()


def eos_of(hf_folder: Path) -> tuple[int, ...]:
    eos = json.loads((hf_folder / "config.json").read_text()).get("eos_token_id")
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)


def run_steps(recorder: Recorder, add: Callable[[int, Request], None], step: Callable[[], bool]) -> None:
    """For engines with continuous batching. `add` hands over a request; `step` advances and says whether work is left."""
    waiting = sorted(range(len(recorder.requests)), key=lambda i: recorder.requests[i].arrival)
    busy = False
    while waiting or busy:
        while waiting and recorder.requests[waiting[0]].arrival <= recorder.now():
            index = waiting.pop(0)
            add(index, recorder.requests[index])
            busy = True
        if busy:
            busy = step()
        elif waiting:
            recorder.wait_until(recorder.requests[waiting[0]].arrival)


def run_batches(
    recorder: Recorder, batch_size: int, run: Callable[[list[int]], None], alike: Callable[[Request], object] = lambda r: r.max_tokens
) -> None:
    """For engines that take a batch and return it whole: whatever has arrived, up to `batch_size`, longest first.

    Requests in one batch are `alike` (by default: share `max_tokens`). Where everything arrives at once the order is by
    length, which an offline user is free to choose and which saves padding.
    """
    left = list(range(len(recorder.requests)))
    while left:
        recorder.wait_until(min(recorder.requests[i].arrival for i in left))
        here = [i for i in left if recorder.requests[i].arrival <= recorder.now()]
        kind = alike(recorder.requests[here[0]])
        here = [i for i in here if alike(recorder.requests[i]) == kind]
        batch = sorted(here, key=lambda i: -len(recorder.requests[i].token_ids))[:batch_size]
        run(batch)
        left = [i for i in left if i not in set(batch)]


def run_one_by_one(recorder: Recorder, run: Callable[[int, Request], None]) -> None:
    """For engines that hold one sequence: first come, first served."""
    for index in sorted(range(len(recorder.requests)), key=lambda i: recorder.requests[i].arrival):
        recorder.wait_until(recorder.requests[index].arrival)
        run(index, recorder.requests[index])


def finished(request: Request, options: LoadOptions, token_id: int, count: int) -> bool:
    """Whether a request ends with this token: enough of them, or end-of-text where that counts."""
    return count >= request.max_tokens or (not request.ignore_eos and token_id in options.eos_token_ids)
