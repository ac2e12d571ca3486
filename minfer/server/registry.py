"""Which servers run on this machine, for `minfer ps`: each one that is ready leaves a note in the user's cache folder.

    <cache>/servers/<process id>.json

The note says where to ask; everything that changes is asked of the server itself. A server that was killed leaves its note behind, which
whoever reads it next takes away.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from minfer.loader.weight_cache import cache_root

logger = logging.getLogger("minfer.server")


def announce(values: dict[str, Any]) -> None:
    """Leaves this process's note. Where that can't be done the server runs all the same, unlisted."""
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        _note(os.getpid()).write_text(json.dumps({**values, "pid": os.getpid()}))
    except OSError as error:
        logger.info("`minfer ps` will not show this server: %s", error)


def withdraw() -> None:
    with contextlib.suppress(OSError):
        _note(os.getpid()).unlink(missing_ok=True)


def announced() -> list[dict[str, Any]]:
    """The notes of processes that are alive; the others are removed."""
    notes = []
    for file in sorted(_folder().glob("*.json")):
        try:
            note = json.loads(file.read_text())
            os.kill(int(file.stem), 0)
        except ProcessLookupError:
            file.unlink(missing_ok=True)
        except (OSError, ValueError):  # somebody else's process, or no note
            continue
        else:
            notes.append(note)
    return notes


def _folder() -> Path:
    return cache_root() / "servers"


def _note(pid: int) -> Path:
    return _folder() / f"{pid}.json"
