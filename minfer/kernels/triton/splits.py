"""Into how many runs K is cut, so that a product with few tiles still has work for every processor."""

from __future__ import annotations

from minfer.kernels.triton.checks import power_of_2
from minfer.kernels.triton.targets import Target

MOST = 16
ROWS = 64  # above, partial sums would cost more than idle processors do


def splits_of(tiles: int, steps: int, rows: int, target: Target) -> int:
    """Until every processor has two programs, a power of two, and no fewer than four steps for each.

    It depends on the shapes and the number of processors only, and so do the sums: no request changes another's by being there, as
    long as the tile of rows stays the same.
    """
    if rows > ROWS:
        return 1
    wanted = -(-2 * target.processors // tiles)
    return max(1, min(power_of_2(wanted), steps // 4, MOST))
