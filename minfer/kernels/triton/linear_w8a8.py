"""Products of 8-bit rows with 8-bit matrices (W8A8): int8 on every target, 8-bit floats where the matrix units have them.

    y[m, n] = sum over groups g of   row scale[m, g] * scale[n, g] * sum_k code x[m, k] * code w[n, k]

A matrix that was calibrated for it meets rows that are rounded on the fly, one scale a token (and 128 inputs, for matrices in groups of
128). What that buys: codes go from memory to the matrix unit as they are, nothing is unpacked, and an 8-bit product runs at twice the
rate of a 16-bit one. What it costs: one more pass over x (a launch, and 3 bytes an input), and the rounding.

    quantize_rows     grid (rows, groups / TILE): the largest magnitude of a group, then its codes
    gemm_w8a8         grid (row blocks, column blocks, SPLITS); w [BLOCK_N, BLOCK_K] and x [BLOCK_K, BLOCK_M] straight into a dot,
                      K-major both, as the matrix units want 8-bit operands

The product is made transposed, with the matrix on the left: Hopper's 8-bit floats have no matrix instruction with fewer than 64 rows on the
left, and a step of 16 requests has 16 rows, but never fewer than 64 outputs.

Integer sums are exact, whatever the order. 8-bit floats: Hopper's matrix unit keeps some 14 bits of a sum, so every 128 inputs are
added up in float32 (`max_num_imprecise_acc`). Scales of whole rows wait for the end; those of groups cost an operation an output and
group. With few tiles K is cut as in linear_gemm.py, whose `reduce_kernel` adds up.

Consecutive programs share columns, not rows: the matrix comes from memory once, and x, which is smaller, from L2.

Where a norm or an activation comes before, and nothing else reads what it makes, that op writes the codes (`rounded.py`) and the pass is
saved: three of a layer's four products have it so, all but the one after attention.

Left out: e5m2 (checkpoints have e4m3; such matrices meet 16-bit rows).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.kernels.ops import RoundedRows, RoundingWeight, Rows
from minfer.kernels.triton.act_mul import LONGEST, act_mul, act_mul_rounded
from minfer.kernels.triton.checks import index, power_of_2, shaped
from minfer.kernels.triton.linear_dense import check_product
from minfer.kernels.triton.linear_gemm import reduce_kernel
from minfer.kernels.triton.rms_norm import rms_norm_rounded
from minfer.kernels.triton.splits import splits_of
from minfer.kernels.triton.targets import Target
from minfer.kernels.triton.tuning import Blocks, Tuning, shape_class
from minfer.quant import PackedWeight

GROUP = 128  # of matrices with a scale for each block of inputs
_LONGEST = 16384  # inputs that a program holds in registers while it looks for the largest


@triton.jit
def quantize_rows_kernel(
    x_ptr, codes_ptr, scales_ptr, x_stride, K: tl.constexpr, GROUP: tl.constexpr, LARGEST: tl.constexpr, INTEGER: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TILE groups of a row; BLOCK >= GROUP inputs of each, or as many at a time."""
    GROUPS: tl.constexpr = K // GROUP
    row = tl.program_id(0).to(tl.int64)
    group, at = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK)[None, :]
    x_at, out_at = x_ptr + row * x_stride + group * GROUP + at, codes_ptr + row * K + group * GROUP + at
    largest = tl.zeros([TILE, BLOCK], tl.float32)
    for start in tl.static_range(0, GROUP, BLOCK):
        inside = (group < GROUPS) & (start + at < GROUP)
        largest = tl.maximum(largest, tl.abs(tl.load(x_at + start, mask=inside, other=0.0).to(tl.float32)))
    scale = tl.max(largest, axis=1)[:, None] / LARGEST
    inverse = tl.where(scale > 0.0, 1.0 / tl.maximum(scale, 1e-30), 0.0)
    tl.store(scales_ptr + row * GROUPS + group, scale, mask=group < GROUPS)
    for start in tl.static_range(0, GROUP, BLOCK):
        inside = (group < GROUPS) & (start + at < GROUP)
        number = tl.load(x_at + start, mask=inside, other=0.0).to(tl.float32) * inverse
        if INTEGER:
            number = tl.floor(number + 0.5)
        tl.store(out_at + start, number.to(codes_ptr.dtype.element_ty), mask=inside)


@triton.jit
def w8a8_tile(
    x_at, x_scales_ptr, row, w_at, scales_ptr, real, n, begin, end,
    K: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The outputs `real` [BLOCK_N] of the rows `row` [BLOCK_M], over steps of BLOCK_K from `begin` to `end`: [BLOCK_N, BLOCK_M] float32.

    w_at [BLOCK_N, 1], x_at [1, BLOCK_M]: where the codes of each begin.
    """
    k = tl.arange(0, BLOCK_K)
    w_at, x_at = w_at + k[None, :], x_at + k[:, None]
    integer: tl.constexpr = x_at.dtype.element_ty == tl.int8
    exact: tl.constexpr = tl.int32 if integer else tl.float32
    sums = tl.zeros([BLOCK_N, BLOCK_M], exact)  # whole rows: added up before any scale
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in range(begin, end):
        at = step * BLOCK_K
        if K % BLOCK_K:
            w = tl.load(w_at + at, mask=(at + k < K)[None, :], other=0.0)
            x = tl.load(x_at + at, mask=(at + k < K)[:, None], other=0.0)
        else:
            w, x = tl.load(w_at + at), tl.load(x_at + at)
        if GROUPS == 1:
            sums = tl.dot(w, x, sums, max_num_imprecise_acc=128, out_dtype=exact)
        else:
            product = tl.dot(w, x, out_dtype=exact).to(tl.float32)
            x_scale, scale = tl.load(x_scales_ptr + row * GROUPS + step), tl.load(scales_ptr + step * n + real)
            acc += product * x_scale[None, :] * scale[:, None]
    if GROUPS == 1:
        acc = sums.to(tl.float32) * tl.load(x_scales_ptr + row * GROUPS)[None, :] * tl.load(scales_ptr + real)[:, None]
    return acc


@triton.jit
def gemm_w8a8_kernel(
    x_ptr, x_scales_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr, rows, n,
    K: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_block, column_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = row_block * BLOCK_M + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    real_row, real = tl.minimum(row, rows - 1), tl.minimum(column, n - 1)
    w_at = codes_ptr + real.to(tl.int64)[:, None] * K
    x_at = x_ptr + real_row.to(tl.int64)[None, :] * K
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    share: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    acc = w8a8_tile(
        x_at, x_scales_ptr, real_row, w_at, scales_ptr, real, n, split * share, tl.minimum(split * share + share, STEPS),
        K, GROUPS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    inside = (row < rows)[None, :] & (column < n)[:, None]
    if SPLITS > 1:
        tl.store(out_ptr + (split * rows + row).to(tl.int64)[None, :] * n + column[:, None], acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + real).to(tl.float32)[:, None]
        tl.store(out_ptr + row.to(tl.int64)[None, :] * n + column[:, None], acc.to(out_ptr.dtype.element_ty), mask=inside)


class TritonRoundedWeight(RoundingWeight):
    """A matrix [N, K] of 8-bit codes, whose rows of x are rounded to 8 bits too."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype, device: torch.device, target: Target, tuning: Tuning) -> None:
        self.shape, self.dtype, self.target, self.tuning = packed.shape, dtype, target, tuning
        self.element = packed.scheme.element
        self.codes, scales = packed.codes.to(device).contiguous(), packed.scales.to(device)
        if self.element != "int8":
            assert target.fp8 is not None, "reason_against has asked"
            if target.fp8 == torch.float8_e4m3fnuz:  # the same bits are half as much, and 0x80 is no zero
                self.codes, scales = self.codes.where(self.codes != -128, 0), scales * 2
            self.codes = self.codes.view(target.fp8)
        self.scales = scales.t().contiguous()  # [groups, N]

    @staticmethod
    def reason_against(packed: PackedWeight, target: Target) -> str | None:
        """Why these kernels can't multiply by the matrix, if so."""
        scheme, k = packed.scheme, packed.shape[1]
        if scheme.element not in ("int8", "fp8_e4m3"):
            return f"there is no product of 8-bit rows with {scheme.name} matrices"
        if scheme.element == "fp8_e4m3" and target.fp8 is None:
            return f"{target.architecture} has no products of 8-bit floats"
        if packed.mins is not None or packed.input_order is not None:
            return "minima and act-order need 16-bit rows"
        if scheme.group_size not in (k, GROUP) or k % 16:
            return f"groups must be whole rows or {GROUP} inputs, and those a multiple of 16, not {scheme.group_size} of {k}"
        return None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        check_product(x, self.shape, self.dtype, self.codes, bias)
        return self.linear_rounded(RoundedRows(*self.quantize_rows(x)), bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None) -> tuple[Rows, torch.Tensor]:
        return rms_norm_rounded(x, weight, eps, residual, self.codes.dtype, self.group)

    def act_mul(self, x: torch.Tensor, kind: str) -> Rows:
        return act_mul_rounded(x, kind, self.codes.dtype, self.group) if x.shape[1] <= 2 * LONGEST else act_mul(x, kind)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.scales.shape[0]

    def linear_rounded(self, x: RoundedRows, bias: torch.Tensor | None) -> torch.Tensor:
        codes, x_scales, rows, (n, k) = x.codes, x.scales, x.shape[0], self.shape
        shaped("rounded rows", codes, rows, k)
        out = torch.empty((rows, n), dtype=self.dtype, device=codes.device)
        if not rows:
            return out
        groups = self.scales.shape[0]
        blocks = self.tuning.blocks(self.class_of(rows), self.default_blocks(rows))
        if groups > 1:
            blocks["BLOCK_K"] = GROUP  # a step is a group
        row_blocks, column_blocks = triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(n, blocks["BLOCK_N"])
        splits = splits_of(row_blocks * column_blocks, triton.cdiv(k, blocks["BLOCK_K"]), rows, self.target)
        partial = out if splits == 1 else torch.empty((splits, rows, n), dtype=torch.float32, device=out.device)
        meta = {"K": k, "GROUPS": groups, "HAS_BIAS": bias is not None, "SPLITS": splits, **blocks}
        gemm_w8a8_kernel[(row_blocks, column_blocks, splits)](codes, x_scales, self.codes, self.scales, bias, partial, rows, n, **meta)
        if splits > 1:
            block = min(1024, power_of_2(n))
            flags = {"SPLITS": splits, "HAS_BIAS": bias is not None, "BLOCK": block, "num_warps": 4}
            reduce_kernel[(rows, triton.cdiv(n, block))](partial, bias, out, rows, n, **flags)
        return out

    def class_of(self, rows: int) -> str:
        """The name of the entry of `tuning.json`."""
        return shape_class("linear", f"{self.element} x {self.element}", rows)

    def default_blocks(self, rows: int) -> Blocks:
        """Where no table says better: tiles that fit 64 KiB of LDS too."""
        if rows <= 16:
            return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4}
        if rows <= 64:
            return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4}
        return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}

    def quantize_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x[T, K] -> its codes [T, K] in the matrix's element, and their scales float32 [T, groups]."""
        rows, (_, k) = x.shape[0], self.shape
        groups = self.scales.shape[0]
        group = k // groups
        codes = torch.empty((rows, k), dtype=self.codes.dtype, device=x.device)
        scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
        block = min(power_of_2(group), _LONGEST)
        tile = 1 if groups == 1 else min(power_of_2(groups), 16)
        integer = self.element == "int8"
        largest = 127.0 if integer else torch.finfo(self.codes.dtype).max
        meta = {"K": k, "GROUP": group, "LARGEST": largest, "INTEGER": integer, "TILE": tile, "BLOCK": block}
        warps = 8 if tile * block > 4096 else 4
        quantize_rows_kernel[(rows, triton.cdiv(groups, tile))](x, codes, scales, x.stride(0), num_warps=warps, **meta)
        return codes, scales

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """In plain torch: a tied quantised table is rare, and a step asks for few rows."""
        index("ids", ids, self.codes, torch.int32, torch.int64)
        codes = self.codes.view(torch.int8)[ids]
        numbers = codes.float() if self.element == "int8" else codes.view(self.codes.dtype).float()
        grouped = numbers.view(ids.shape[0], self.scales.shape[0], -1) * self.scales[:, ids].t()[:, :, None]
        return grouped.view(ids.shape[0], -1).to(self.dtype)
