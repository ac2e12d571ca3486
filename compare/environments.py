"""One virtual environment per engine, because they need conflicting versions of torch and transformers.

An engine's recipe is data (`EngineInfo.install`), a few pip calls; this file only carries it out. The environment is complete
when `installed.json` is there, and that file is written last, so an interrupted set-up is begun again. With `--here`, an
engine whose modules can be imported by the running interpreter uses that instead (minfer always does).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare.engines.base import EngineInfo, Install
from compare.errors import SetupError
from compare.places import engine_root
from compare.process import last_words

Say = Callable[[str], None]

_FREEZE = (
    "import importlib.metadata as m, json; print(json.dumps(sorted({d.name + '==' + d.version for d in m.distributions() if d.name})))"
)
_REQUIREMENTS = "import importlib.metadata as m, json, sys; print(json.dumps(m.requires(sys.argv[1]) or []))"


def importable_here(info: EngineInfo) -> bool:
    """Whether the running interpreter has everything the engine needs (looked up, not imported)."""
    try:
        return bool(info.modules) and all(importlib.util.find_spec(m) is not None for m in info.modules)
    except ModuleNotFoundError:  # the parent package of a dotted name is missing
        return False


def venv_python(engine: str) -> Path:
    return engine_root(engine) / "venv" / "bin" / "python"


def find_python(info: EngineInfo, device: str, *, here: bool) -> Path | None:
    """The interpreter to run an engine with, or None where `setup` has to come first."""
    if (here or not info.install) and importable_here(info):
        return Path(sys.executable)
    record = _record(info.name)
    if record is not None and record["recipe"] == _recipe(info, device):
        return venv_python(info.name)
    return None


def preloads(info: EngineInfo, python: Path) -> tuple[Path, ...]:
    """The libraries that the engine's documentation wants loaded first, as far as they are installed beside its interpreter."""
    return tuple(file for name in info.preload if (file := python.parent.parent / name).exists())


def why_not(info: EngineInfo, device: str) -> str | None:
    """Why an engine can't be installed on this machine at all; None where it can be tried."""
    if info.reason and not info.precisions:
        return info.reason
    if sys.version_info < info.min_python:
        return f"needs Python {'.'.join(map(str, info.min_python))} or newer"
    if device not in info.devices():
        return f"runs on {' and '.join(d.upper() for d in info.devices())} only" if info.devices() else info.reason
    return None


def setup(info: EngineInfo, device: str, say: Say = lambda _: None) -> Path:
    """Makes the environment if it isn't there; returns its interpreter. Raises `SetupError` with pip's last words."""
    if (reason := why_not(info, device)) is not None:
        raise SetupError(f"{info.name} cannot be installed here: {reason}")
    if not info.install:
        if not importable_here(info):
            raise SetupError(f"{info.name} runs in this interpreter, which lacks {', '.join(info.modules)}: install the project first")
        return Path(sys.executable)
    if (python := find_python(info, device, here=False)) is not None:
        return python
    root = engine_root(info.name)
    log = root / "setup.log"
    python = venv_python(info.name)
    root.mkdir(parents=True, exist_ok=True)
    if not python.exists():
        say(f"{info.name}: making an environment in {root / 'venv'}")
        _run([sys.executable, "-m", "venv", "--clear", str(root / "venv")], log, info.name)
    for step in _steps(info, device):
        _pip(python, step, log, info.name, say)
    versions = json.loads(_output([str(python), "-c", _FREEZE]))
    (root / "installed.json").write_text(json.dumps({"recipe": _recipe(info, device), "versions": versions}, indent=1))
    return python


def installed_versions(python: Path) -> list[str]:
    """`name==version` of everything in an interpreter's environment."""
    versions: list[str] = json.loads(_output([str(python), "-c", _FREEZE]))
    return versions


def clean(engine: str) -> bool:
    """Removes an engine's environment and its converted models. Says whether there was anything."""
    root = engine_root(engine)
    if not root.exists():
        return False
    shutil.rmtree(root)
    return True


def _steps(info: EngineInfo, device: str) -> tuple[Install, ...]:
    return info.install.get(device, info.install.get("any", ()))


def _recipe(info: EngineInfo, device: str) -> list[dict[str, Any]]:
    """Compared with the one on disk: a changed recipe means a stale environment."""
    recipe: list[dict[str, Any]] = json.loads(json.dumps([asdict(s) for s in _steps(info, device)]))
    return recipe


def _record(engine: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((engine_root(engine) / "installed.json").read_text())
    except (OSError, ValueError):
        return None
    return record if venv_python(engine).exists() else None


def _pip(python: Path, step: Install, log: Path, engine: str, say: Say) -> None:
    packages = list(step.packages)
    if step.requirements_of:
        wanted = json.loads(_output([str(python), "-c", _REQUIREMENTS, step.requirements_of]))
        packages += [w for w in wanted if _name(w) not in step.without and "extra ==" not in w]
    say(f"{engine}: installing {', '.join(packages[:6])}{' ...' if len(packages) > 6 else ''}")
    options = ["--no-deps"] if step.no_deps else []
    _run([str(python), "-m", "pip", "install", "--no-input", *options, *packages], log, engine, dict(step.env))
    if step.remove:
        _run([str(python), "-m", "pip", "uninstall", "--yes", *step.remove], log, engine)


def _name(requirement: str) -> str:
    """The project a requirement string begins with, normalised."""
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), len(requirement))
    return requirement[:end].lower().replace("_", "-")


def _run(command: list[str], log: Path, engine: str, env: dict[str, str] | None = None) -> None:
    with log.open("ab") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, check=False).returncode
    if code:
        raise SetupError(f"{engine} could not be installed: {last_words(log)} (whole log: {log})")


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
