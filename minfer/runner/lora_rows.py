"""Which rows of a step go through which LoRA adapter: sorted and cut into tiles for the kernels (`LoraRows`).

Rows of one adapter needn't be neighbours: they are, within a request, and a step has many. Sorting numbers of rows on the host costs
microseconds, and every tile then has one adapter, whose matrices are read once for it (SGMV: Chen et al., "Punica", arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minfer.batch import LoraRows

TILE_ROWS = 16  # of a step with a token or a few drafts each: the least that a matrix instruction takes
PROMPT_TILE_ROWS = 64


def most_tiles(rows: int, adapters: int) -> int:
    """The number of tiles that so many rows with any of so many adapters may take."""
    begun = min(rows, adapters)
    return begun + (rows - begun) // TILE_ROWS


@dataclass(frozen=True, slots=True)
class LoraBuffers:
    """The host's side of a step's `LoraRows`, allocated once."""

    rows: torch.Tensor
    tiles: torch.Tensor

    @staticmethod
    def empty(max_rows: int, adapters: int) -> LoraBuffers:
        tiles = torch.zeros(most_tiles(max_rows, adapters), 3, dtype=torch.int32)
        return LoraBuffers(torch.zeros(max_rows, dtype=torch.int32), tiles)

    def fill(self, adapters: Sequence[int], counts: Sequence[int], few: int = 1) -> LoraRows:
        """`adapters[i]` is that of `counts[i]` rows, one after the other; 0 is none. At least one has one. More rows of one than `few`
        are a prompt's.
        """
        numbers = np.array(adapters).repeat(counts)
        order = np.argsort(numbers, kind="stable")
        numbers = numbers[order]
        order, numbers = order[numbers > 0], numbers[numbers > 0]
        self.rows.numpy()[: len(order)] = order
        found, firsts, sizes = np.unique(numbers, return_index=True, return_counts=True)
        groups = list(zip(found.tolist(), firsts.tolist(), sizes.tolist(), strict=True))
        tile_rows = TILE_ROWS if max(counts) <= few else PROMPT_TILE_ROWS
        tiles = [
            (adapter, first + begin, min(tile_rows, size - begin)) for adapter, first, size in groups for begin in range(0, size, tile_rows)
        ]
        self.tiles.numpy()[: len(tiles)] = tiles
        return LoraRows(self.rows[: len(order)], self.tiles[: len(tiles)], groups, tile_rows)
