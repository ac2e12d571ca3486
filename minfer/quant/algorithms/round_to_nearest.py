"""Round-to-nearest: each weight becomes the nearest number its group can say. No data, a pass or two over the weights.

    round_to_nearest(weight[N, K], scheme) -> PackedWeight

takes every element but table4: int8, int4, int3 and int2, symmetric or with zero points; fp8 e4m3 and e5m2; fp6; fp4; nf4;
and with scale_type="e8m0" and groups of 32 the MX formats (mxfp8, mxfp6, mxfp4, mxint8), with "e4m3" and 16 nvfp4.

`scheme.group_size` inputs share a scale: K for one a row. The scales are those with the smallest squared error (scales.py).
"""

from __future__ import annotations

import torch

from minfer.errors import ConfigError
from minfer.quant.algorithms.grid import Grid, grid_of
from minfer.quant.algorithms.scales import ScaleSearch
from minfer.quant.packed import PackedWeight, QuantScheme

CHUNK = 2**22  # weights encoded at once


def round_to_nearest(
    weight: torch.Tensor,
    scheme: QuantScheme,
    *,
    importance: torch.Tensor | None = None,
    per_tensor: bool = False,
    search: bool = True,
) -> PackedWeight:
    """weight: any float type [N, K]. importance: float [K], how much an error at each input matters, or
    [K / group_size, group_size, group_size], how much errors of a group's inputs matter together; None: equally.

    per_tensor: one scale for the whole matrix, written out for every row (fp8's coarsest form; symmetric schemes only).
    search: look for scales that clip; without it the largest weight of each group is representable.
    Raises ConfigError where the groups don't divide K, or weights aren't finite.
    """
    n, k = weight.shape
    check_groups(scheme, k)
    limit = float(weight.abs().max()) if weight.numel() else 0.0
    if not limit < float("inf"):
        raise ConfigError(f"a matrix {[n, k]} with weights that are not finite can't be quantised; the checkpoint is damaged")
    if per_tensor:
        if not scheme.symmetric:
            raise ConfigError("one scale for a whole matrix is symmetric; ask for groups to have zero points")
        row = torch.full((1, 1, 1), limit)
        scale, _ = ScaleSearch(scheme, limit, search=False).find(row)
        return encode(weight, scheme, scale.expand(n, k // scheme.group_size).contiguous(), None)
    finder = ScaleSearch(scheme, limit, search=search)
    size, parts = scheme.group_size, []
    wide = importance.view(k // size, size) if importance is not None and importance.dim() == 1 else importance
    rows = max(1, CHUNK // k)
    for begin in range(0, n, rows):
        parts.append(finder.find(weight[begin : begin + rows].float().view(-1, k // size, size), wide))
    zeros = None if scheme.symmetric else torch.cat([zero for _, zero in parts if zero is not None])
    return encode(weight, scheme, torch.cat([scale for scale, _ in parts]), zeros)


def encode(
    weight: torch.Tensor,
    scheme: QuantScheme,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    input_order: torch.Tensor | None = None,
) -> PackedWeight:
    """The nearest codes under given scales and zeros, float32 [N, K / group_size]; columns are in `input_order` already."""
    n, k = weight.shape
    grid, size = grid_of(scheme.element, scheme.symmetric), scheme.group_size
    codes = torch.empty(n, k, dtype=torch.int8)
    rows = max(1, CHUNK // k)
    for begin in range(0, n, rows):
        part = slice(begin, begin + rows)
        x = weight[part].float().view(-1, k // size, size) / scales[part, :, None]
        if zeros is not None:
            x += zeros[part, :, None]
        codes[part] = grid.encode(x).view(-1, k)
    return pack(codes, scheme, grid, scales, zeros, input_order)


def pack(
    codes: torch.Tensor,
    scheme: QuantScheme,
    grid: Grid,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    input_order: torch.Tensor | None = None,
) -> PackedWeight:
    mins = None if zeros is None else scales * -zeros
    levels = None if scheme.element != "nf4" else grid.levels
    return PackedWeight(codes, scales, mins, scheme, levels=levels, input_order=input_order)


def check_groups(scheme: QuantScheme, k: int) -> None:
    if scheme.group_size < 1 or k % scheme.group_size:
        fitting = [size for size in (16, 32, 64, 128, 256) if k % size == 0]
        raise ConfigError(f"groups of {scheme.group_size} don't divide {k} inputs; sizes that do are {', '.join(map(str, fitting)) or k}")
