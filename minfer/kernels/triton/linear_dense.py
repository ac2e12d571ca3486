"""Products with dense matrices: our own for 1 to 4 rows, the vendor's library above.

With one row every weight is read once and used once: N K values move for 2 N K operations, and the only question is how near to
the memory's bandwidth the reads run. A matrix instruction wants 16 rows and would idle; so the product is a plain sum.

    grid (N / COLUMNS); a program owns COLUMNS outputs and walks K in tiles

                 K ->   [ BLOCK ][ BLOCK ] ...
    COLUMNS rows of W   16-byte loads, each value used once per row of x
    x, up to 4 rows     from L2 and L1: every program reads the same

    acc[row, column, k] += w[column, k] * x[row, k]     one reduction over k, after the last tile

The accumulator keeps the tile's K axis, so the loop has no communication between threads at all. The order of additions depends on
nothing but K: rows don't see their neighbours.

From 5 rows on it is a matrix product like any other, and cuBLAS or hipBLASLt does it (`torch.nn.functional.linear`): that is what a
Triton kernel would be measured against, and at best equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.ops import Weight
from minfer.kernels.triton.checks import on_device, power_of_2, row_stride, shaped
from minfer.kernels.triton.gather import gather

GEMV_ROWS = 4
_BLOCK = 256


@triton.jit
def gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, n, x_stride, K: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row, k = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    # Columns past the end read the last one again and are not stored: a mask on the weights would cost more.
    w_at = weight_ptr + tl.minimum(column, n - 1).to(tl.int64)[:, None] * K + k[None, :]
    x_at = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    acc = tl.zeros([ROWS, COLUMNS, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        if K % BLOCK:
            w = tl.load(w_at + start, mask=(start + k < K)[None, :], other=0.0)
            x = tl.load(x_at + start, mask=(start + k < K)[None, :], other=0.0)
        else:
            w = tl.load(w_at + start)
            x = tl.load(x_at + start)
        acc += x.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
    out = tl.sum(acc, axis=2)  # [ROWS, COLUMNS]
    if HAS_BIAS:
        out += tl.load(bias_ptr + tl.minimum(column, n - 1)).to(tl.float32)[None, :]
    at = out_ptr + row.to(tl.int64)[:, None] * n + column[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < n)[None, :])


def check_product(x: torch.Tensor, shape: torch.Size, dtype: torch.dtype, like: torch.Tensor, bias: torch.Tensor | None) -> int:
    """The row stride of x[T, K], after checking it and the bias against a weight [N, K] for activations of `dtype`."""
    if x.dim() != 2 or x.shape[1] != shape[1] or x.dtype != dtype:
        raise ConfigError(f"this matrix multiplies {dtype} [T, {shape[1]}], not {x.dtype} {list(x.shape)}")
    on_device("x", x, like)
    if bias is not None:
        shaped("bias", bias, shape[0])
        row_stride("bias", bias, x)
    return row_stride("x", x)


class TritonDenseWeight(Weight):
    """A matrix [N, K] as it is, on the device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tensor.shape

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        stride = check_product(x, self.shape, self.tensor.dtype, self.tensor, bias)
        rows, (n, k) = x.shape[0], self.shape
        if not 1 <= rows <= GEMV_ROWS:
            return F.linear(x, self.tensor, bias)
        out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
        rows_tile, columns = power_of_2(rows), 16 if rows == 1 else 8
        meta = {"HAS_BIAS": bias is not None, "ROWS": rows_tile, "COLUMNS": columns, "BLOCK": _BLOCK, "num_warps": 4, "num_stages": 3}
        gemv_kernel[(triton.cdiv(n, columns),)](x, self.tensor, bias, out, rows, n, stride, K=k, **meta)
        return out

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return gather(ids, self.tensor)
