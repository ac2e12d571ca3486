"""From what the user asked for to a list of contenders: engine, precision, interpreter, converted weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare import environments
from compare.engines import ADAPTERS, info_of
from compare.engines.base import EngineInfo
from compare.errors import CompareError, EngineFailure, SetupError
from compare.places import engine_root, prepared_model
from compare.process import EngineProcess
from compare.results import Contender
from compare.weights import Weights

DEFAULT_PRECISIONS = ("bf16", "int8", "int4")
PREPARE_LIMIT = 3600.0


@dataclass(frozen=True)
class Wanted:
    """One row: an engine in one precision, and what stood behind `=` (a server's address)."""

    info: EngineInfo
    precision: str
    argument: str = ""

    @property
    def label(self) -> str:
        return f"{self.info.name}/{self.precision}"

    def contender(self) -> Contender:
        i = self.info
        return Contender(self.label, i.name, self.precision, i.title, i.setting, i.batching)


def wanted(against: Sequence[str], precisions: Sequence[str], device: str) -> list[Wanted]:
    """minfer and the named engines, each in every asked precision that it has.

    A name may carry its own precision (`llamacpp/q4_1`) or, for `openai`, an address (`openai=http://...`). `all` is every
    engine with an adapter for this device.
    """
    names = [n.strip() for n in against if n.strip()]
    if "all" in names:
        names = [n for n in ADAPTERS if device in info_of(n).devices() and n != "openai"] + [n for n in names if n.startswith("openai=")]
    rows: list[Wanted] = []
    for name in ["minfer", *[n for n in names if n != "minfer"]]:
        name, _, argument = name.partition("=")
        name, _, own = name.partition("/")
        info = info_of(name)
        if info.name == "openai" and not argument:
            raise CompareError("openai needs the address of a server: --against openai=http://127.0.0.1:8000/v1")
        have = info.precisions.get(device, ())
        if own:
            chosen: Sequence[str] = (own,)
        else:
            chosen = [p for p in (precisions or DEFAULT_PRECISIONS) if p in have] or list(have[:1]) or ["-"]
        rows += [Wanted(info, p, argument) for p in chosen]
    return list({row.label + row.argument: row for row in rows}.values())


def prepare(row: Wanted, weights: Weights, device: str, *, here: bool, say: Callable[[str], None]) -> tuple[Path, Path]:
    """Interpreter and converted model of a row, made where missing. Raises `SetupError` or `EngineFailure` with the reason."""
    if (reason := environments.why_not(row.info, device)) is not None:
        raise SetupError(reason)
    if row.precision not in row.info.precisions[device]:
        raise SetupError(f"{row.info.name} has no {row.precision} on {device}; it has {', '.join(row.info.precisions[device])}")
    python = environments.find_python(row.info, device, here=here) or environments.setup(row.info, device, say)
    model = prepared_model(row.info.name, f"{weights.name}-{weights.hash}", row.precision)
    if not model.exists():
        say(f"{row.label}: converting the weights")
        convert(row, weights, python, model)
    return python, model


def convert(row: Wanted, weights: Weights, python: Path, model: Path) -> None:
    """Runs the adapter's `prepare` in its own process; the folder gets its name only when it is whole."""
    partial = model.with_name(model.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with EngineProcess(row.info.name.replace("-", "_"), python, engine_root(row.info.name) / "prepare.log") as process:
            process.ask("prepare", PREPARE_LIMIT, weights=str(weights.folder), precision=row.precision, out=str(partial))
    except (EngineFailure, OSError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(model)
