"""GPTQ (Frantar 2022): quantise column by column, and let the columns that are left make up for each one's error.

With X the layer's inputs and H = X^T X (its Hessian, [K, K]), rounding column i of W by an error e_i raises the squared error of
the output least if every later column moves by -e_i / R[i, i] * R[i, j], where R is the upper Cholesky factor of H^-1: row i of
R is what Gaussian elimination of columns 0..i-1 leaves of H^-1. The arithmetic is done in blocks: inside a block column by
column, and its effect on all later columns as one product.

A little of the mean diagonal is added to H (damping), because calibration data never spans every direction. Inputs that were
always zero have no say: their weights are rounded to zero.

Order. Columns that see large inputs are best done first, while most others can still compensate ("act-order"):

    none     as they come
    static   largest first, but groups stay runs of inputs with scales found before anything moves: any kernel runs it
    group    largest first and groups follow that order; the best use of scales, but inputs must be reordered at run time
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from minfer.errors import ConfigError
from minfer.quant.algorithms.round_to_nearest import check_groups, pack
from minfer.quant.algorithms.scales import ScaleSearch
from minfer.quant.packed import PackedWeight, QuantScheme

Order = Literal["none", "static", "group"]
BLOCK = 128
MAX_DAMPING = 1.0


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: QuantScheme, *, damping: float = 0.01, order: Order = "static"
) -> PackedWeight:
    """weight: any float type [N, K]; hessian: float32 [K, K], X^T X over any number of tokens (its scale doesn't matter).

    Raises ConfigError where the groups don't divide K, or numbers aren't finite.
    """
    n, k = weight.shape
    check_groups(scheme, k)
    if not bool(torch.isfinite(hessian).all()):
        raise ConfigError("the calibration data made activations that are not finite; use other data, or check the checkpoint")
    w = weight.float().clone()
    diagonal = hessian.diagonal()
    w[:, diagonal == 0] = 0
    scatter = torch.arange(k) if order == "none" else torch.argsort(diagonal, descending=True, stable=True)
    w, factor = w[:, scatter], inverse_factor(hessian[scatter][:, scatter], damping)
    search = ScaleSearch(scheme, float(w.abs().max()))
    grouping = scatter // scheme.group_size if order == "static" else torch.arange(k) // scheme.group_size
    groups = _Groups(search, n, k // scheme.group_size, grouping)
    if order == "static":
        groups.find_all(weight.float(), diagonal)
    codes = _columns(w, factor, groups, diagonal[scatter], fixed=order == "static")
    return _in_file_order(codes, scatter, groups, scheme, order)


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor R of (H + damping * mean(diag H) I)^-1 = R^T R. More damping where it is needed to have one."""
    diagonal = hessian.diagonal()
    empty = diagonal == 0
    mean = float(diagonal.mean()) or 1.0
    while damping <= MAX_DAMPING:
        damped = hessian.clone()
        damped.diagonal()[empty] = mean
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            del damped
            upper: torch.Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return upper
        damping = max(damping * 10, 1e-4)
    raise ConfigError("the inputs of a layer are too alike to tell its weights apart; use more or longer calibration samples")


class _Groups:
    """Scales and zeros of the groups, [N, G], and which group each column (in processing order) belongs to."""

    def __init__(self, search: ScaleSearch, n: int, count: int, of_column: torch.Tensor) -> None:
        self.search = search
        self.scales = torch.ones(n, count)
        self.zeros = None if search.scheme.symmetric else torch.zeros(n, count)
        self.of_column: list[int] = of_column.tolist()

    def find_all(self, weight: torch.Tensor, importance: torch.Tensor) -> None:
        size = self.search.scheme.group_size
        self.scales, self.zeros = self.search.find(weight.view(weight.shape[0], -1, size), importance.view(-1, size))

    def find(self, group: int, columns: torch.Tensor, importance: torch.Tensor) -> None:
        scale, zero = self.search.find(columns[:, None, :].contiguous(), importance[None])
        self.scales[:, group] = scale[:, 0]
        if self.zeros is not None and zero is not None:
            self.zeros[:, group] = zero[:, 0]


def _columns(w: torch.Tensor, factor: torch.Tensor, groups: _Groups, importance: torch.Tensor, *, fixed: bool) -> torch.Tensor:
    """The codes [N, K] in processing order; `w` is used up."""
    (n, k), size, grid = w.shape, groups.search.scheme.group_size, groups.search.grid
    codes = torch.empty(n, k, dtype=torch.int8)
    block = _block_size(size) if not fixed else BLOCK
    for begin in range(0, k, block):
        end = min(begin + block, k)
        errors = torch.empty(n, end - begin)
        for i in range(begin, end):
            if not fixed and i % size == 0:  # every earlier column has been made up for by now
                groups.find(i // size, w[:, i : i + size], importance[i : i + size])
            group, column = groups.of_column[i], w[:, i]
            scale = groups.scales[:, group]
            zero = None if groups.zeros is None else groups.zeros[:, group]
            x = column / scale if zero is None else column / scale + zero
            codes[:, i] = grid.encode(x)
            nearest = grid.nearest(x)
            rounded = scale * (nearest if zero is None else nearest - zero)
            error = (column - rounded) / factor[i, i]
            w[:, i + 1 : end] -= error[:, None] * factor[i, i + 1 : end]
            errors[:, i - begin] = error
        w[:, end:] -= errors @ factor[begin:end, end:]
    return codes


def _block_size(group: int) -> int:
    """Scales are found at a group's start, from weights that must be up to date: a group inside a block, or blocks inside a group."""
    return group * (BLOCK // group) if group <= BLOCK else math.gcd(group, BLOCK)


def _in_file_order(codes: torch.Tensor, scatter: torch.Tensor, groups: _Groups, scheme: QuantScheme, order: Order) -> PackedWeight:
    """Columns back to where they were; with scattered groups, sorted by group and within it by input, as readers have them."""
    grid = groups.search.grid
    if order != "group":
        in_place = torch.empty_like(codes)
        in_place[:, scatter] = codes
        return pack(in_place, scheme, grid, groups.scales, groups.zeros)
    group_of_input = torch.empty_like(scatter)
    group_of_input[scatter] = torch.arange(len(scatter)) // scheme.group_size
    input_order = torch.argsort(group_of_input, stable=True)
    position = torch.empty_like(scatter)
    position[scatter] = torch.arange(len(scatter))
    in_order = torch.equal(input_order, torch.arange(len(scatter)))
    return pack(codes[:, position[input_order]], scheme, grid, groups.scales, groups.zeros, None if in_order else input_order)
