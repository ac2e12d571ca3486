"""One comparison from beginning to end: prepare every contender, run the cells, keep what there is when interrupted."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from compare import machine, plan, quality, workloads
from compare.budget import Budget
from compare.engines import info_of
from compare.environments import installed_versions, preloads
from compare.errors import CompareError, EngineFailure, SetupError
from compare.exclusive import alone
from compare.fleet import Launch, start
from compare.places import reference_file, without_paths
from compare.process import EngineProcess
from compare.results import Store
from compare.runner import Entry, Runner, Settings, log_of
from compare.weights import Weights, get_weights
from compare.worker import folder_bytes


@dataclass(frozen=True)
class Asked:
    """What the user asked for. Recorded in the results, so that --resume and readers see the same."""

    against: list[str]
    model: str
    precisions: list[str]
    workloads: list[str]
    threads: int
    repeats: int
    device: str
    text: Path | None
    windows: int
    prompts: int
    limit: float
    time_budget: float  # minutes, 0 for none
    case_seconds: float
    scale: float
    here: bool
    command: str


def run_session(asked: Asked, folder: Path, console: Console, *, resume: bool) -> bool:
    """Runs it; False when interrupted by Ctrl-C (what was done is kept). Raises `CompareError` for what can't be run at all."""
    if asked.threads > len(machine.physical_cpus()):
        raise CompareError(f"--threads {asked.threads}: this process may use {len(machine.physical_cpus())} physical cores")
    say: Callable[[str], None] = lambda line: console.print(line, highlight=False)  # noqa: E731
    with alone(say):
        return _run_alone(asked, folder, console, say, resume=resume)


def _run_alone(asked: Asked, folder: Path, console: Console, say: Callable[[str], None], *, resume: bool) -> bool:
    budget = Budget(asked.time_budget * 60, asked.case_seconds)
    cpus = tuple(machine.physical_cpus()[: asked.threads or None])
    weights = get_weights(asked.model)
    source = _source(weights, asked)
    cases = workloads.build(asked.workloads, source)
    rows = plan.wanted(asked.against, asked.precisions, asked.device)
    store = Store.open(folder) if resume else Store.create(folder, {})
    if resume and store.results.meta.get("model", {}).get("hash") not in (None, weights.hash):
        raise CompareError(f"{folder} holds results of other weights; --resume needs the same model")
    try:
        store.results.meta.update(_meta(asked, weights, cpus, store.results.meta.get("ceilings", {}), say))
        store.save()
        entries = _prepare(rows, weights, asked, cpus, store, folder, say)
        text = _quality_text(source, asked) if weights.real else workloads.QualityText()
        reference = _reference(weights, asked, cpus, folder, say) if weights.real else None
        settings = Settings(asked.device, len(cpus), asked.repeats, asked.limit, store.results.meta["ceilings"], text, budget)
        _run(Runner(entries, cases, weights, settings, store, reference), console)
    except KeyboardInterrupt:
        say(f"interrupted; what was measured is kept: python -m compare --resume {folder} ... goes on")
        return False
    except OSError as error:
        raise CompareError(f"the run stopped: {error}; what was measured is in {folder}, and --resume {folder} goes on") from error
    finally:
        store.results.meta["finished"] = time.strftime("%Y-%m-%d %H:%M:%S")
    store.save()
    return True


def _run(runner: Runner, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    total = sum(1 for _ in runner.cells())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=total)

        def show(label: str, case: str, repeat: int) -> None:
            progress.update(task, description=f"{label}  {case}  #{repeat + 1}", advance=1)

        runner.progress = show
        runner.run()


def _source(weights: Weights, asked: Asked) -> workloads.Source:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(weights.folder / "tokenizer.json"))
    limit = int(weights.config["max_position_embeddings"])

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return workloads.Source(weights.vocab_size, limit, encode, real=weights.real, scale=asked.scale)


def _quality_text(source: workloads.Source, asked: Asked) -> workloads.QualityText:
    return workloads.quality_text(source, asked.text, asked.prompts, asked.windows, source.scaled(64, 8))


def _meta(asked: Asked, weights: Weights, cpus: tuple[int, ...], known: dict[str, float], say: Callable[[str], None]) -> dict[str, Any]:
    """known: ceilings of the run that is resumed, so that one run is judged by one roofline."""
    say("looking at the machine")
    facts, busy = machine.describe(), machine.busy_share(1.0)
    warnings = []
    if busy is not None and busy > machine.BUSY:
        warnings.append(f"the machine was {busy:.0%} busy with something else when the run began; its figures are not to be trusted")
        say(f"warning: {warnings[-1]}")
    ceilings = known or machine.ceilings(len(cpus), asked.device)
    if not ceilings:
        warnings.append("no C++ compiler was found, so memory bandwidth and peak operations are unknown and no roofline is shown")
    if not weights.real:
        warnings.append(f"{weights.name} has random weights: speed only, its outputs mean nothing")
    if asked.scale != 1:
        warnings.append(f"workloads were scaled to {asked.scale:g} of their size: figures are for trying things out")
    options = {k: v.name if isinstance(v, Path) else v for k, v in asdict(asked).items() if k != "command"}
    options["model"] = weights.name  # not the path it may have been given by
    return {
        "command": asked.command,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "machine": facts,
        "device": asked.device,
        "cpus": list(cpus),
        "ceilings": ceilings,
        "model": {"name": weights.name, "hash": weights.hash, "real": weights.real, "config": weights.config},
        "options": options,
        "warnings": warnings,
    }


def _prepare(
    rows: list[plan.Wanted], weights: Weights, asked: Asked, cpus: tuple[int, ...], store: Store, folder: Path, say: Callable[[str], None]
) -> list[Entry]:
    """The contenders that can run; the others keep their row, with the reason."""
    entries = []
    for row in rows:
        contender = store.results.contenders.setdefault(row.label, row.contender())
        try:
            python, model = plan.prepare(row, weights, asked.device, here=asked.here, say=say)
        except (SetupError, EngineFailure, OSError) as error:
            contender.state = without_paths(str(error))
            say(f"{row.label}: {error}")
            continue
        contender.state, contender.packages = "ok", installed_versions(python)
        module = row.info.name.replace("-", "_")
        log, preload = log_of(folder, row.label), preloads(row.info, python)
        launch = Launch(row.label, module, python, model, log, cpus, expected_bytes=2 * folder_bytes(model), preload=preload)
        entries.append(Entry(launch, row.precision, row.info.prefix_caching, row.info.ids, row.argument))
    return entries


def _reference(weights: Weights, asked: Asked, cpus: tuple[int, ...], folder: Path, say: Callable[[str], None]) -> quality.Reference | None:
    """fp32 transformers on the same weights, started only if its answers aren't known yet; None where it can't be had."""
    row = plan.Wanted(info_of("transformers"), "fp32")
    try:
        python, model = plan.prepare(row, weights, asked.device, here=asked.here, say=say)
    except (SetupError, EngineFailure) as error:
        say(f"no reference: {error}")
        return None
    launch = Launch(row.label, "transformers", python, model, log_of(folder, "reference"), cpus, expected_bytes=0)

    def begin() -> EngineProcess:
        say("asking fp32 transformers for the reference answers (kept for later runs)")
        process = start(launch)
        process.load(model, quality.reference_options(asked.device, len(cpus), weights.vocab_size, 2048), asked.limit)
        return process

    return quality.Reference(reference_file(weights.hash), begin, weights.vocab_size, max(asked.limit, 1800.0))
