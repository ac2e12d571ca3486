"""Runs the cells of a comparison, fairly: engines take turns in the order A B C, then C B A, and only one of them ever runs.

A cell is one engine, one case, one repeat. An engine that fails a case isn't asked for its later repeats (the reason stands in
the table); whatever else it can do is still run. How many repeats there is time for is the business of `budget.py`. Warm-up is
outside the clock: a short form of the case, whenever an engine meets a case for the first time since it was loaded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compare import quality
from compare.budget import Budget
from compare.errors import EngineFailure
from compare.fleet import Fleet, Launch, start
from compare.machine import busy_share
from compare.measure import Numbers, summarise
from compare.places import without_paths
from compare.process import EngineProcess
from compare.protocol import LoadOptions, Request, Trace
from compare.results import Cell, Store
from compare.roofline import Shape, bound
from compare.weights import Weights
from compare.workloads import Case, QualityText

WARM_TOKENS, WARM_REQUESTS = 8, 8
GATE = Case("gate", "agreement", "agreement", kind="quality", repeats=1)


@dataclass(frozen=True)
class Entry:
    """A contender that is ready to run."""

    launch: Launch
    precision: str
    prefix_caching: bool
    ids: bool = True
    argument: str = ""


@dataclass
class Settings:
    """What holds for the whole run."""

    device: str
    threads: int
    repeats: int
    limit: float
    ceilings: dict[str, float]
    text: QualityText = field(default_factory=QualityText)
    budget: Budget = field(default_factory=Budget)


class Runner:
    """`run` executes every cell that the store doesn't have. `progress(label, case, repeat)` is called before each."""

    def __init__(
        self,
        entries: list[Entry],
        cases: list[Case],
        weights: Weights,
        settings: Settings,
        store: Store,
        reference: quality.Reference | None,
        progress: Callable[[str, str, int], None] = lambda *_: None,
    ) -> None:
        self.entries, self.weights, self.settings, self.store = entries, weights, settings, store
        self.reference, self.progress = reference, progress
        self.cases = ([GATE] if reference is not None and not any(c.workload == "quality" for c in cases) else []) + cases
        self._shape = Shape.from_config(weights.config)
        self._warm: set[tuple[str, str]] = set()  # contender and case, since the contender was loaded

    def cells(self) -> Iterable[tuple[Entry, Case, int]]:
        """Every cell that may be run, in order: by workload, then repeat, then case, engines forwards and backwards in turn."""
        for workload in self._workloads():
            for repeat in range(self._rounds(workload)):
                for entry, case in self._round(workload, repeat):
                    yield entry, case, repeat

    def run(self) -> None:
        with Fleet(self.settings.limit) as fleet:
            workloads = self._workloads()
            for index, workload in enumerate(workloads):
                self.settings.budget.begin(len(workloads) - index)
                for repeat in range(self._rounds(workload)):
                    cells = [(e, c) for e, c in self._round(workload, repeat) if self._wanted(e, c, repeat)]
                    if repeat and not self.settings.budget.round_fits(sum(self._taken(e, c)[-1] for e, c in cells if self._taken(e, c))):
                        self._note(f"{workload}: the time budget allowed {repeat} of {self._rounds(workload)} repeats")
                        break
                    for entry, case in cells:
                        self.progress(entry.launch.label, case.key, repeat)
                        self.store.put(*self._cell(fleet, entry, case, repeat))

    def _workloads(self) -> list[str]:
        return list(dict.fromkeys(c.workload for c in self.cases))

    def _rounds(self, workload: str) -> int:
        return max(self._repeats(c) for c in self.cases if c.workload == workload)

    def _round(self, workload: str, repeat: int) -> list[tuple[Entry, Case]]:
        cases = [c for c in self.cases if c.workload == workload and repeat < self._repeats(c)]
        order = self.entries if repeat % 2 == 0 else self.entries[::-1]
        return [(entry, case) for case in cases for entry in order]

    def _wanted(self, entry: Entry, case: Case, repeat: int) -> bool:
        """Not there yet, and either the first repeat or one that the engine's time for this case still allows."""
        return not self.store.done(entry.launch.label, case.key, repeat) and self.settings.budget.case_fits(self._taken(entry, case))

    def _taken(self, entry: Entry, case: Case) -> list[float]:
        return [c.seconds for c in self.store.results.cells_of(entry.launch.label, case.key) if c.status == "ok"]

    def _note(self, text: str) -> None:
        notes = self.store.results.meta.setdefault("notes", [])
        if text not in notes:
            notes.append(text)

    def _repeats(self, case: Case) -> int:
        return case.repeats or self.settings.repeats

    def _cell(self, fleet: Fleet, entry: Entry, case: Case, repeat: int) -> tuple[Cell, list[Trace]]:
        label = entry.launch.label
        cell = Cell(label, case.key, repeat, "failed", case.metric, higher_is_better=case.higher_is_better)
        earlier = [c for c in self.store.results.cells_of(label, case.key) if c.status != "ok" and c.repeat < repeat]
        if earlier:
            cell.status, cell.reason = earlier[-1].status, earlier[-1].reason
            return cell, []
        traces: list[Trace] = []
        try:
            cell.busy = busy_share()
            cell.numbers, traces, cell.seconds = self._measure(fleet, entry, case)
            cell.status = "ok"
            weight_bytes = self.store.results.contenders[label].weight_bytes
            cell.bound = bound(case, self._shape, self.settings.ceilings, weight_bytes, entry.precision)
        except EngineFailure as failure:
            cell.status = "unsupported" if failure.kind == "unsupported" else "failed"
            cell.reason = without_paths(f"{failure.kind}: {failure}" if cell.status == "failed" else str(failure))
            if failure.kind in ("crash", "timeout", "invalid"):
                fleet.drop(label)  # its state can't be trusted
        except NotImplementedError as missing:
            cell.status, cell.reason = "unsupported", str(missing)
        return cell, traces

    def _measure(self, fleet: Fleet, entry: Entry, case: Case) -> tuple[Numbers, list[Trace], float]:
        """Figures, traces, and the seconds that it took without loading (with, where loading is what is measured)."""
        if case.prefix_caching and not entry.prefix_caching:
            raise NotImplementedError("the engine (or its adapter) reuses no prefix")
        if case.kind in ("load", "memory"):
            start = time.monotonic()
            return *self._fresh(fleet, entry, case), time.monotonic() - start
        process, new = fleet.use(entry.launch, self._options(entry, case), lambda facts: self._loaded(entry, facts))
        if new:
            self._warm = {pair for pair in self._warm if pair[0] != entry.launch.label}
        start = time.monotonic()
        try:
            if case.kind == "quality":
                return self._quality(process, entry, case), [], time.monotonic() - start
            traces = self._timed(process, entry, case)
            return summarise(traces, case.slo), traces, time.monotonic() - start
        finally:
            process.pause()

    def _timed(self, process: EngineProcess, entry: Entry, case: Case) -> list[Trace]:
        requests, vocab, pair = list(case.requests), self.weights.vocab_size, (entry.launch.label, case.key)
        if pair not in self._warm:
            process.generate(warm_up(case), self.settings.limit, vocab)
            self._warm.add(pair)
        return process.generate(requests, self.settings.limit, vocab)

    def _quality(self, process: EngineProcess, entry: Entry, case: Case) -> Numbers:
        text, limit = self.settings.text, self.settings.limit
        if case.name == "perplexity":
            try:
                return quality.text_perplexity(process, text, limit)
            except ValueError as error:
                raise EngineFailure("invalid", str(error)) from error
        if self.reference is None:
            raise NotImplementedError("there is no reference: transformers could not be set up")
        if case.name == "next token":
            return quality.divergence(process, text, self.reference, limit)
        if not entry.ids:
            raise NotImplementedError("it answers in text, so its token ids can't be compared")
        if case is GATE:
            text = QualityText(text.prompts[: quality.GATE_PROMPTS], [], min(text.max_tokens, quality.GATE_TOKENS))
        return quality.agreement(process, text, self.reference, limit, self.weights.vocab_size)

    def _fresh(self, fleet: Fleet, entry: Entry, case: Case) -> tuple[Numbers, list[Trace]]:
        """Load time and memory, in a process of its own."""
        fleet.drop(entry.launch.label)
        with start(entry.launch) as process:
            facts = process.load(entry.launch.model, self._options(entry, case), self.settings.limit)
            self._loaded(entry, facts)
            traces = process.generate(list(case.requests), self.settings.limit, self.weights.vocab_size)
            memory = process.ask("memory", self.settings.limit)
        numbers: Numbers = {"load_s": facts["load_s"] + traces[0].times[0], "peak_resident_bytes": float(memory["resident"])}
        if memory["device"] is not None:
            numbers["peak_device_bytes"] = float(memory["device"])
        return numbers, traces

    def _options(self, entry: Entry, case: Case) -> LoadOptions:
        """Load options that fit every case of the workload, so that an engine is loaded once for it."""
        together = [c for c in self.cases if c.workload == case.workload and c.prefix_caching == case.prefix_caching]
        context = max(c.max_context for c in together)
        if case.kind == "quality":
            text = self.settings.text
            context = max([len(p) + text.max_tokens for p in text.prompts] + [len(w) + 1 for w in text.windows])
        return LoadOptions(
            precision=entry.precision,
            device=self.settings.device,
            threads=self.settings.threads,
            max_context=-(-(context + 1) // 64) * 64,
            max_concurrency=8 if case.kind == "quality" else max(c.concurrency for c in together),
            prefix_caching=case.prefix_caching,
            vocab_size=self.weights.vocab_size,
            eos_token_ids=self.weights.eos_token_ids,
            argument=entry.argument,
        )

    def _loaded(self, entry: Entry, facts: dict[str, Any]) -> None:
        contender = self.store.results.contenders[entry.launch.label]
        contender.version, contender.flags = str(facts.get("version", "")), without_paths(str(facts.get("flags", "")))
        contender.weight_bytes, contender.load_s = int(facts["weight_bytes"]), float(facts["load_s"])


def warm_up(case: Case) -> list[Request]:
    """A short form of a case: its first requests, all at once, a few tokens each."""
    return [replace(r, max_tokens=min(r.max_tokens, WARM_TOKENS), arrival=0.0) for r in case.requests[:WARM_REQUESTS]]


def log_of(folder: Path, label: str) -> Path:
    """Where a contender's own output goes: beside the results, for whoever wonders why it failed."""
    with contextlib.suppress(OSError):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    return folder / "logs" / f"{label.replace('/', '-')}.log"
