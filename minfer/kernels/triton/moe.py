"""A mixture of experts on the GPU: route, sort, two grouped products with the activation between them, and the weighted sum.

    router logits [T, E]   ->  experts, shares [T, top_k]              moe_route.py
                           ->  blocks of pairs, each of one expert     moe_route.py, with few pairs not at all
    x [T, H]               ->  gate | up of each pair [T top_k, 2I]    moe_gemm.py
                           ->  act(gate) * up [T top_k, I]             act_mul.py
                           ->  down [T top_k, H]                       moe_gemm.py
    times shares, added up ->  [T, H], + sigmoid(gate) * shared        moe_gemm.py

Seven launches, five with few pairs. No grid depends on what another launch computed, so steps with experts are replayed from CUDA graphs.

The matrices of all experts are joined to one tensor [E, N, ...], each in the layout that the plain products have: dense, codes in groups
(int4, int8, fp8, tables; 16-bit rows), or 8-bit codes that meet rows rounded to 8 bits: x once a token, by a launch more, and what the
activation makes by the activation itself. Gate and up may be of two kinds (GGUF mixes them); then they are two products side by side.

How many rows a block has follows from the mean number of rows an expert gets, T top_k / E, a function of the step's size alone. Left out:
matrices in another order of their inputs (act-order), which differs from expert to expert; and rounding x in the norm before, as the
router reads it too.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence

import torch
import triton

from minfer.kernels.ops import Experts, RoundedRows, Rows, StackedWeight, Weight
from minfer.kernels.triton.act_mul import act_mul
from minfer.kernels.triton.checks import power_of_2, row_stride, shaped
from minfer.kernels.triton.linear_codes import TritonCodesWeight
from minfer.kernels.triton.linear_dense import TritonDenseWeight, check_product
from minfer.kernels.triton.linear_w8a8 import GROUP, TritonRoundedWeight
from minfer.kernels.triton.moe_gemm import combine_kernel, grouped_bytes_kernel, grouped_codes_kernel, grouped_dense_kernel
from minfer.kernels.triton.moe_route import Blocks, route, sort_by_expert
from minfer.kernels.triton.tuning import Tuning, shape_class

_COMBINE = 1024
_UNLIKE = "the experts of a layer must be quantised alike, and by this backend"


class Grouped(ABC):
    """One matrix [N, K] of every expert. `joined` is its tensor [E, N, ...], `dtype` that of the activations."""

    kind: str  # in `tuning.json`
    shape: torch.Size
    dtype: torch.dtype
    joined: torch.Tensor
    nbytes: int

    @abstractmethod
    def multiply(self, x: Rows, blocks: Blocks, divisor: int, out: torch.Tensor, launch: dict[str, int]) -> None:
        """out[p] = matrix of p's expert @ x[p // divisor], for every pair p; out's rows may have any stride."""

    def class_of(self, rows: int) -> str:
        """The name of the entry of `tuning.json`, for blocks of `rows`."""
        return shape_class("moe", self.kind, rows)

    @abstractmethod
    def default_blocks(self, rows: int) -> dict[str, int]:
        """Where no table says better, for blocks of `rows`."""

    def act_mul(self, x: torch.Tensor, kind: str) -> Rows:
        """act(gate) * up, as `multiply` takes it."""
        return act_mul(x, kind)


class GroupedDense(Grouped):
    kind = "dense"

    def __init__(self, parts: Sequence[TritonDenseWeight]) -> None:
        self.joined = torch.stack([part.tensor for part in parts])
        self.shape, self.dtype, self.nbytes = parts[0].shape, self.joined.dtype, self.joined.nbytes

    def multiply(self, x: Rows, blocks: Blocks, divisor: int, out: torch.Tensor, launch: dict[str, int]) -> None:
        assert isinstance(x, torch.Tensor), "nothing rounds rows for dense matrices"
        n, k = self.shape
        meta = {**launch, "K": k, "DIVISOR": divisor, "SORTED": blocks.pairs is not None, "BLOCK_M": blocks.rows}
        operands, sizes = (x, self.joined, blocks.experts, blocks.pairs), (out.shape[0], n, x.stride(0), out.stride(0))
        grouped_dense_kernel[(blocks.count, triton.cdiv(n, launch["BLOCK_N"]))](*operands, out, *sizes, **meta)

    def default_blocks(self, rows: int) -> dict[str, int]:
        if rows <= 32:
            return {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
        return {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


class GroupedCodes(Grouped):
    def __init__(self, parts: Sequence[TritonCodesWeight]) -> None:
        self.kind = f"{parts[0].element} by {parts[0].run}"
        self.shape, self.dtype = parts[0].shape, parts[0].dtype
        alike = [part.with_minima() for part in parts] if len({part.zeros is None for part in parts}) > 1 else list(parts)
        self.joined = torch.stack([part.codes for part in alike])
        self.scales = _stacked([part.scales for part in alike])
        self.mins, self.zeros = _stacked([part.mins for part in alike]), _stacked([part.zeros for part in alike])
        self.table = alike[0].tile_table
        self.nbytes = sum(t.nbytes for t in (self.joined, self.scales, self.mins, self.zeros, self.table) if t is not None)
        self.meta = alike[0].tile_meta

    def multiply(self, x: Rows, blocks: Blocks, divisor: int, out: torch.Tensor, launch: dict[str, int]) -> None:
        assert isinstance(x, torch.Tensor), "nothing rounds rows for 16-bit products"
        n = self.shape[0]
        meta = {**launch, **self.meta, "DIVISOR": divisor, "SORTED": blocks.pairs is not None, "BLOCK_M": blocks.rows}
        operands = (x, self.joined, self.scales, self.mins, self.zeros, self.table, blocks.experts, blocks.pairs)
        sizes = (out.shape[0], n, x.stride(0), out.stride(0))
        grouped_codes_kernel[(blocks.count, triton.cdiv(n, launch["BLOCK_N"]))](*operands, out, *sizes, **meta)

    def default_blocks(self, rows: int) -> dict[str, int]:
        return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


class GroupedBytes(Grouped):
    def __init__(self, parts: Sequence[TritonRoundedWeight]) -> None:
        self.kind = f"{parts[0].element} x {parts[0].element}"
        self.shape, self.dtype = parts[0].shape, parts[0].dtype
        self.joined = torch.stack([part.codes.view(torch.int8) for part in parts]).view(parts[0].codes.dtype)
        self.scales = torch.stack([part.scales for part in parts])
        self.nbytes = self.joined.nbytes + self.scales.nbytes
        self._first = copy.copy(parts[0])  # which rounds rows, as any would; it holds no memory of its own from here on
        self._first.codes, self._first.scales = self.joined[0], self.scales[0]

    def act_mul(self, x: torch.Tensor, kind: str) -> Rows:
        return self._first.act_mul(x, kind)

    def multiply(self, x: Rows, blocks: Blocks, divisor: int, out: torch.Tensor, launch: dict[str, int]) -> None:
        (n, k), groups = self.shape, self.scales.shape[1]
        rows = x if isinstance(x, RoundedRows) else RoundedRows(*self._first.quantize_rows(x))
        if groups > 1:
            launch = {**launch, "BLOCK_K": GROUP}  # a step is a group
        meta = {**launch, "K": k, "GROUPS": groups, "DIVISOR": divisor, "SORTED": blocks.pairs is not None, "BLOCK_M": blocks.rows}
        operands = (rows.codes, rows.scales, self.joined, self.scales, blocks.experts, blocks.pairs)
        grid = (blocks.count, triton.cdiv(n, launch["BLOCK_N"]))
        grouped_bytes_kernel[grid](*operands, out, out.shape[0], n, out.stride(0), **meta)

    def default_blocks(self, rows: int) -> dict[str, int]:
        if rows <= 16:
            return {"BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4}
        return {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}


class TritonExperts(Experts):
    """gate_up: products side by side, of [2I, H] together; down: [H, I]."""

    def __init__(self, gate_up: Sequence[Grouped], down: Grouped, tuning: Tuning) -> None:
        self.gate_up, self.down, self.tuning = gate_up, down, tuning

    @staticmethod
    def of(gate_up: Sequence[Weight], down: Sequence[Weight], tuning: Tuning) -> Experts | str:
        """The experts, or why these kernels can't go through them."""
        parts = [_parts(weight) for weight in gate_up]
        if len(gate_up) != len(down) or len({len(own) for own in parts}) > 1:
            return "every expert needs a down matrix, and gate and up in as many parts as the others'"
        sides = [_grouped(column) for column in (*zip(*parts, strict=True), down)]
        reason = next((side for side in sides if isinstance(side, str)), None)
        if reason is not None:
            return reason
        *first, last = (side for side in sides if isinstance(side, Grouped))
        (width, inner), outputs = last.shape, sum(side.shape[0] for side in first)
        if outputs != 2 * inner or any(side.shape[1] != width for side in first):
            return f"behind gate and up of {[list(side.shape) for side in first]} there can't be down of {[width, inner]}"
        return TritonExperts(first, last, tuning)

    @property
    def nbytes(self) -> int:
        return sum(grouped.nbytes for grouped in (*self.gate_up, self.down))

    def moe(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        top_k: int,
        renormalize: bool,
        kind: str,
        shared: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        first, (tokens, width), count = self.gate_up[0], x.shape, self.down.joined.shape[0]
        check_product(x, first.shape, first.dtype, first.joined, None)
        shaped("router_logits", router_logits, tokens, count)
        row_stride("router_logits", router_logits, x)
        strides: tuple[int, int] = (0, 0)
        extra: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if shared is not None:
            shaped("the shared expert's output", shared[0], tokens, width)
            shaped("the shared expert's gate", shared[1], tokens, 1)
            strides = row_stride("the shared expert's output", shared[0], x), row_stride("the shared expert's gate", shared[1], x)
            extra = shared
        out = torch.empty((tokens, width), dtype=x.dtype, device=x.device)
        if not tokens:
            return out
        experts, shares = route(router_logits, top_k, renormalize)
        blocks = sort_by_expert(experts, count, block_rows(tokens * top_k, count))
        gate_up = self._products(self.gate_up, x, blocks, top_k, tokens * top_k)
        y = self._products([self.down], self.down.act_mul(gate_up, kind), blocks, 1, tokens * top_k)
        block = min(_COMBINE, power_of_2(width))
        flags = {"TOP_K": top_k, "HAS_SHARED": shared is not None, "BLOCK": block, "num_warps": 4}
        combine_kernel[(tokens, triton.cdiv(width, block))](y, shares, *extra, out, width, *strides, **flags)
        return out

    def _products(self, side: Sequence[Grouped], x: Rows, blocks: Blocks, divisor: int, pairs: int) -> torch.Tensor:
        out = torch.empty((pairs, sum(grouped.shape[0] for grouped in side)), dtype=self.down.dtype, device=blocks.experts.device)
        at = 0
        for grouped in side:
            launch = self.tuning.blocks(grouped.class_of(blocks.rows), grouped.default_blocks(blocks.rows))
            grouped.multiply(x, blocks, divisor, out[:, at : at + grouped.shape[0]], launch)
            at += grouped.shape[0]
        return out


def block_rows(pairs: int, experts: int) -> int:
    """Of a block: enough for what an expert gets on average, 16 to 64."""
    return min(64, max(16, power_of_2(-(-pairs // experts))))


def _parts(weight: Weight) -> list[Weight]:
    return list(weight.parts) if isinstance(weight, StackedWeight) else [weight]


def _grouped(parts: Sequence[Weight]) -> Grouped | str:
    """One matrix of each expert."""
    dense = [part for part in parts if isinstance(part, TritonDenseWeight)]
    codes = [part for part in parts if isinstance(part, TritonCodesWeight)]
    rounded = [part for part in parts if isinstance(part, TritonRoundedWeight)]
    if any(part.order is not None for part in codes):
        return "experts in another order of their inputs (act-order) have no grouped product"
    forms: set[Hashable] = {part.shape for part in dense}
    forms |= {(part.shape, part.element, part.group, part.run, part.offset) for part in codes}
    forms |= {(part.shape, part.element, part.scales.shape) for part in rounded}
    if len(forms) != 1 or len(parts) not in (len(dense), len(codes), len(rounded)):
        return _UNLIKE
    if dense:
        return GroupedDense(dense)
    if rounded:
        return GroupedBytes(rounded)
    tables = [part.table for part in codes if part.table is not None]
    return GroupedCodes(codes) if all(torch.equal(table, tables[0]) for table in tables) else _UNLIKE


def _stacked(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """[E, ...]; in 32 bits if not all are of one type."""
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return None
    one_type = len({tensor.dtype for tensor in present}) == 1
    return torch.stack(present if one_type else [tensor.float() for tensor in present])
