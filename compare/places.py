"""Where compare keeps things on the user's disk: outside the repository, under the user's cache folder.

<cache>/minfer/compare/<engine>/venv               its isolated environment
<cache>/minfer/compare/<engine>/models/<model>-<precision>   its own form of the weights
<cache>/minfer/compare/weights/<model>             the one HF folder that every engine starts from
<cache>/minfer/compare/reference/                  what fp32 transformers says, by hash of the weights
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "minfer" / "compare"


def engine_root(engine: str) -> Path:
    return cache_root() / engine


def prepared_model(engine: str, model: str, precision: str) -> Path:
    return engine_root(engine) / "models" / f"{model}-{precision}"


def weights_of(model: str) -> Path:
    return cache_root() / "weights" / model


def reference_file(weights_hash: str) -> Path:
    return cache_root() / "reference" / f"{weights_hash}.json"


def without_paths(text: str) -> str:
    """A message as others may read it: this machine's own folders, which say nothing to them, become words."""
    known = ((cache_root(), "CACHE"), (Path(__file__).resolve().parent.parent, "."), (Path.cwd(), "."), (Path.home(), "~"))
    for folder, word in (*known, (Path(tempfile.gettempdir()), "TMP")):
        text = text.replace(str(folder), word) if len(folder.parts) > 1 else text
    return text
