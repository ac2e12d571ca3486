"""Block shapes of the products, from a committed table: `tuning.json`, written by `python -m minfer.kernels.tune`.

    {"cuda:90": {"linear int4, 16 rows": {"BLOCK_M": 16, "BLOCK_N": 64, ..., "num_warps": 4, "num_stages": 4}}}

An entry is found by architecture, op and shape class: the kind of the matrix, and the rows of x rounded up to a power of two. What has
no entry takes the kernel's own default, which is said once at debug level. Nothing is timed while serving: the first request would pay
for it, and two servers of one model could compute different bits.

Each entry says where it comes from (`source`): measured on a device, or predicted from the machine code (`cost/`), which holds until a
device has been asked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minfer.errors import ConfigError
from minfer.kernels.triton.checks import power_of_2

logger = logging.getLogger("minfer.kernels")

TABLE = Path(__file__).with_name("tuning.json")
Blocks = Mapping[str, int]
MOST_ROWS = 256  # from here on shapes are large enough to be one class


def shape_class(op: str, kind: str, rows: int) -> str:
    """The name of an entry. rows >= 1."""
    bucket = power_of_2(min(rows, MOST_ROWS))
    return f"{op} {kind}, {bucket} row{'s' * (bucket > 1)}"


class Tuning:
    """The entries of one architecture. Which were missed is remembered, so that each is said once."""

    def __init__(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        self._entries = entries
        self._missed: set[str] = set()

    @staticmethod
    def of(architecture: str) -> Tuning:
        """Raises ConfigError for a table that can't be read."""
        try:
            entries = json.loads(TABLE.read_text()).get(architecture, {})
        except (OSError, ValueError) as error:
            raise ConfigError(f"{TABLE} can't be read ({error}); make it anew with python -m minfer.kernels.tune") from error
        return Tuning(entries)

    def blocks(self, name: str, default: Blocks) -> dict[str, int]:
        """The launch's constants: the entry's where there is one, for those that `default` names."""
        entry = self._entries.get(name)
        if entry is None:
            if name not in self._missed:
                self._missed.add(name)
                logger.debug("no tuned block shapes for %s; taking %s", name, dict(default))
            return dict(default)
        unknown = set(entry) - set(default) - {"source"}
        if unknown:
            raise ConfigError(f"{TABLE.name} gives {name} {', '.join(sorted(unknown))}, which its kernel doesn't have")
        return {key: int(entry.get(key, value)) for key, value in default.items()}
