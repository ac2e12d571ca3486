"""The file that a comparison leaves: `results.json`, complete after every cell, and `traces.jsonl.gz` with every token's time.

Cells are written as they finish, by replacing the file in one step, so Ctrl-C, a crash or a full disk leaves the last good
state; `--resume` runs what isn't there or didn't succeed. `report` needs nothing but this file.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compare.errors import CompareError
from compare.measure import Numbers
from compare.protocol import Trace

FORMAT = 1


@dataclass
class Cell:
    """One engine, one case, one repeat. status: ok | failed | unsupported.

    busy: share of the CPUs that others used before it. seconds: what it cost, warm-up included, loading not.
    """

    engine: str
    case: str
    repeat: int
    status: str
    metric: str
    numbers: Numbers = field(default_factory=dict)
    reason: str = ""
    higher_is_better: bool = True
    bound: float | None = None
    busy: float | None = None
    seconds: float = 0.0
    at: float = 0.0

    @property
    def value(self) -> float | None:
        return self.numbers.get(self.metric)


@dataclass
class Contender:
    """One engine in one precision. label: `llamacpp/int8`. state: ok, or why it did not take part."""

    label: str
    name: str
    precision: str
    title: str
    setting: str
    batching: str
    state: str = "ok"
    version: str = ""
    flags: str = ""
    weight_bytes: int = 0
    load_s: float = 0.0
    packages: list[str] = field(default_factory=list)


@dataclass
class Results:
    """A run. meta: command, machine, ceilings, model, options, warnings."""

    meta: dict[str, Any]
    contenders: dict[str, Contender] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)

    def values(self, engine: str, case: str) -> dict[int, float]:
        """The case's own figure by repeat."""
        return {c.repeat: c.value for c in self.cells if c.engine == engine and c.case == case and c.status == "ok" and c.value is not None}

    def cells_of(self, engine: str, case: str) -> list[Cell]:
        return [c for c in self.cells if c.engine == engine and c.case == case]

    def cases(self) -> list[str]:
        """Case keys in the order they were first run."""
        return list(dict.fromkeys(c.case for c in self.cells))

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "meta": self.meta,
            "contenders": [asdict(c) for c in self.contenders.values()],
            "cells": [asdict(c) for c in self.cells],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        contenders = {c["label"]: Contender(**c) for c in data["contenders"]}
        return cls(data["meta"], contenders, [Cell(**c) for c in data["cells"]])


class Store:
    """A run's folder. Raises `CompareError` when it can't be written or read."""

    def __init__(self, folder: Path, results: Results) -> None:
        self.folder, self.results = folder, results

    @classmethod
    def create(cls, folder: Path, meta: dict[str, Any]) -> Store:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompareError(f"the results folder {folder} cannot be made: {error}") from error
        return cls(folder, Results(meta))

    @classmethod
    def open(cls, folder: Path) -> Store:
        return cls(folder, read_results(folder))

    def done(self, engine: str, case: str, repeat: int) -> bool:
        """Whether a cell need not be run: it succeeded, or the engine can't do such a thing at all."""
        return any(c.repeat == repeat and c.status in ("ok", "unsupported") for c in self.results.cells_of(engine, case))

    def put(self, cell: Cell, traces: Sequence[Trace] = ()) -> None:
        """Keeps a cell, in place of an earlier try at the same one."""
        cell.at = time.time()
        same = (cell.engine, cell.case, cell.repeat)
        self.results.cells = [c for c in self.results.cells if (c.engine, c.case, c.repeat) != same] + [cell]
        if traces:
            record = {"engine": cell.engine, "case": cell.case, "repeat": cell.repeat, "traces": [_compact(t) for t in traces]}
            # Each line is a gzip member of its own: an interrupted write costs that line only.
            with (self.folder / "traces.jsonl.gz").open("ab") as file:
                file.write(gzip.compress(json.dumps(record, separators=(",", ":")).encode() + b"\n"))
        self.save()

    def save(self) -> None:
        target = self.folder / "results.json"
        temporary = target.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self.results.as_json(), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)


def read_results(folder: Path) -> Results:
    file = folder / "results.json" if folder.is_dir() else folder
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompareError(f"no results can be read from {file}: {error}") from error
    if data.get("format") != FORMAT:
        raise CompareError(f"{file} has format {data.get('format')!r}; this version reads format {FORMAT}")
    return Results.from_json(data)


def _compact(trace: Trace) -> dict[str, Any]:
    """Times in microseconds as differences: a tenth of the size."""
    micro = [round(t * 1e6) for t in trace.times]
    steps = [b - a for a, b in zip([0, *micro], micro, strict=False)]
    return {"arrival": round(trace.arrival, 6), "prompt": trace.prompt_tokens, "us": steps}
