"""Matrices in the layouts of the compiled products, and how a matrix gets there.

`LinearKernels.prepare` packs a matrix once, at load: a quantised one keeps its codes, scales and minima exactly as they
are (nothing is rounded again), a dense one its values. Scales that came as float16, as those of most files did, are stored
as float16, which saves a sixth of what decoding 4-bit codes reads. linear_tile.h and linear_dense.cpp describe the layouts.

How a quantised matrix meets its activations is chosen here too. `int8`: each token's activations are rounded to int8 in
groups of 32 and the products are exact integers (llama.cpp does the same with its Q8_1); `none`: activations stay as they are
and codes are multiplied as bfloat16 or float32 numbers.

Left out: groups that 32 doesn't divide, and dense matrices in another type than the activations'; the next backend in the
list takes those.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch

from minfer.errors import ConfigError
from minfer.kernels.cpu.arena import WeightArena
from minfer.kernels.cpu.runtime import DTYPES, Runtime
from minfer.kernels.ops import StackedWeight, Weight
from minfer.quant import PackedWeight

Activation = Literal["int8", "none"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PANEL = 32  # columns that are stored together
GROUP = 32  # inputs that share a scale of the activations


class LinearKernels:
    """The compiled products of one runtime, and the packing of matrices for them."""

    def __init__(self, runtime: Runtime, activation: Activation = "int8") -> None:
        if activation not in ("int8", "none"):
            raise ConfigError(f"activation must be int8 or none, not {activation!r}")
        self.runtime = runtime
        self.activation = activation
        self.arena = WeightArena()
        self.linear_quantized = runtime.op(
            "linear_quantized", "ptr x, int x_stride, ptr y, int y_stride, ptr bias, int rows, int dtype, ptr weight"
        )
        self.linear_dense = runtime.op(
            "linear_dense", "ptr x, int x_stride, ptr y, int y_stride, ptr bias, int rows, int dtype, ptr weight, int n, int k"
        )
        self.gather_quantized = runtime.op("gather_quantized", "ptr ids, ptr y, int rows, int id_dtype, int dtype, ptr weight")
        self.gather_dense = runtime.op("gather_dense", "ptr ids, ptr y, int rows, int id_dtype, int dtype, ptr weight, int k")
        self.pack_codes = runtime.op("pack_codes", "ptr codes, ptr out, int panel_bytes, int n, int k, int bits, int shift")
        self.pack_scales = runtime.op(
            "pack_scales", "ptr scales, ptr mins, ptr out, int panel_bytes, int n, int groups, int repeat, int half"
        )
        self.pack_dense = runtime.op("pack_dense", "ptr weight, ptr out, int n, int k, int dtype")

    def prepare(self, weight: torch.Tensor | PackedWeight, dtype: torch.dtype) -> Weight | str:
        """What `Backend.prepare` asks for: the matrix packed, or the reason for declining it."""
        if dtype not in FLOATS:
            return f"activations must be float32, bfloat16 or float16, not {dtype}"
        if isinstance(weight, torch.Tensor):
            if weight.dtype != dtype:
                return f"a {weight.dtype} matrix can't multiply {dtype} activations; cast it first"
            return CpuDenseWeight(self, weight)
        if weight.scheme.element not in ("int4", "int8"):
            return f"codes must be int4 or int8, not {weight.scheme.element}"
        if weight.input_order is not None:
            return "its groups are not runs of inputs (act-order)"
        if weight.scheme.group_size % GROUP:
            return f"groups must be multiples of {GROUP}, not {weight.scheme.group_size}"
        return CpuQuantizedWeight(self, weight, dtype)


class CpuWeight(Weight):
    """A matrix whose product can be written into some columns of a wider output."""

    dtype: torch.dtype

    def __init__(self, kernels: LinearKernels) -> None:
        self._kernels = kernels

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = self._kernels.runtime.empty((x.shape[0], self.shape[0]), self.dtype)
        self.linear_into(x, bias, y)
        return y

    @abstractmethod
    def linear_into(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """y[T, N], rows of any stride, = x @ weight.T + bias."""


class CpuStackedWeight(StackedWeight):
    """Each part writes into its own columns of one output: nothing is copied, and a recorded step stays recordable."""

    parts: list[CpuWeight]  # type: ignore[assignment]

    def __init__(self, runtime: Runtime, parts: Sequence[Weight]) -> None:
        super().__init__(parts)
        self._runtime = runtime

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = self._runtime.empty((x.shape[0], self.shape[0]), x.dtype)
        first = 0
        for part in self.parts:
            end = first + part.shape[0]
            part.linear_into(x, None if bias is None else bias[first:end], y[:, first:end])
            first = end
        return y


class CpuDenseWeight(CpuWeight):
    """A matrix [N, K] in the activations' own type, in panels of 32 columns."""

    def __init__(self, kernels: LinearKernels, tensor: torch.Tensor) -> None:
        super().__init__(kernels)
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        n, k = tensor.shape
        inputs = k + k % 2 if tensor.dtype == torch.bfloat16 else k
        self._data = kernels.arena.empty(_padded(n) * inputs, tensor.dtype)
        tensor = tensor.contiguous()
        kernels.pack_dense(tensor.data_ptr(), self._data.data_ptr(), n, k, DTYPES[self.dtype])

    @property
    def nbytes(self) -> int:
        return self._data.nbytes

    def linear_into(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        runtime, (n, k) = self._kernels.runtime, self.shape
        _check_input(x, k, self.dtype, bias)
        pointers = (runtime.ptr(x), x.stride(0), runtime.ptr(y), y.stride(0), runtime.ptr(bias))
        self._kernels.linear_dense(*pointers, x.shape[0], DTYPES[self.dtype], runtime.ptr(self._data), n, k)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        runtime, k = self._kernels.runtime, self.shape[1]
        types = (_check_ids(ids), DTYPES[self.dtype])
        y = runtime.empty((ids.shape[0], k), self.dtype)
        self._kernels.gather_dense(runtime.ptr(ids), runtime.ptr(y), ids.shape[0], *types, runtime.ptr(self._data), k)
        return y


class CpuQuantizedWeight(CpuWeight):
    """A matrix [N, K] of 4- or 8-bit codes with grouped scales and, if it has them, minima.

    levels: for 4-bit codes 0..15 that index a table (NF4, FP4, IQ4_NL), the 16 values they stand for; in int8 mode they are
    rounded to 1/127 of the largest, because the products are int8's.
    """

    def __init__(self, kernels: LinearKernels, packed: PackedWeight, dtype: torch.dtype, levels: Sequence[float] | None = None) -> None:
        super().__init__(kernels)
        self.shape = packed.shape
        self.dtype = dtype
        n, k = packed.shape
        bits = 4 if packed.scheme.element == "int4" else 8
        int8 = kernels.activation == "int8"
        scales, offset, table = packed.scales.float(), 128 if bits == 8 else 0, None
        if levels is not None and int8:
            unit = max(abs(level) for level in levels) / 127
            levels, scales, offset = [float(round(level / unit)) for level in levels], scales * unit, 128
            table = torch.tensor([int(level) + 128 for level in levels], dtype=torch.uint8)
        elif levels is None and bits == 4:
            offset = 8 if packed.scheme.symmetric else 0
            levels = [float(code - offset) for code in range(16)]

        shift = offset if table is None else 0
        group, half = self._pack(packed, scales, bits, shift)
        self._levels = torch.tensor(levels or [0.0] * 16, dtype=torch.float32)
        self._table = table
        # The struct QuantizedWeight of linear_weight.h: all fields 8 bytes.
        value_dtype = torch.int8 if int8 else torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        addresses = [0 if t is None else t.data_ptr() for t in (self._panels, self._levels, self._table)]
        fields = [*addresses, n, k, bits, group, offset, packed.mins is not None, half, DTYPES[value_dtype]]
        self._struct = torch.tensor([int(field) for field in fields], dtype=torch.int64)

    def _pack(self, packed: PackedWeight, scales: torch.Tensor, bits: int, shift: int) -> tuple[int, bool]:
        """Fills `_panels`; returns the group as stored (32 times a power of two) and whether float16 held the scales."""
        (n, k), groups, size = packed.shape, scales.shape[1], packed.scheme.group_size
        parts = size // GROUP
        group = GROUP * (parts & -parts)  # a group of 96 is stored as three of 32 with the same scale
        mins = None if packed.mins is None else packed.mins.float().contiguous()
        half = _fits_half(scales) and (mins is None or _fits_half(mins))
        code_bytes = k * PANEL * bits // 8
        panel_bytes = code_bytes + (k // group) * PANEL * (1 if mins is None else 2) * (2 if half else 4)
        self._panels = self._kernels.arena.empty(_padded(n) // PANEL * panel_bytes, torch.uint8)
        codes, scales, start = packed.codes.contiguous(), scales.contiguous(), self._panels.data_ptr()
        self._kernels.pack_codes(codes.data_ptr(), start, panel_bytes, n, k, bits, shift)
        address = 0 if mins is None else mins.data_ptr()
        self._kernels.pack_scales(scales.data_ptr(), address, start + code_bytes, panel_bytes, n, groups, size // group, half)
        return group, half

    @property
    def nbytes(self) -> int:
        return self._panels.nbytes

    def linear_into(self, x: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        runtime, k = self._kernels.runtime, self.shape[1]
        _check_input(x, k, self.dtype, bias)
        pointers = (runtime.ptr(x), x.stride(0), runtime.ptr(y), y.stride(0), runtime.ptr(bias))
        self._kernels.linear_quantized(*pointers, x.shape[0], DTYPES[self.dtype], runtime.ptr(self._struct))

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        runtime = self._kernels.runtime
        types = (_check_ids(ids), DTYPES[self.dtype])
        y = runtime.empty((ids.shape[0], self.shape[1]), self.dtype)
        self._kernels.gather_quantized(runtime.ptr(ids), runtime.ptr(y), ids.shape[0], *types, runtime.ptr(self._struct))
        return y


def _padded(n: int) -> int:
    return -(-n // PANEL) * PANEL


def _fits_half(values: torch.Tensor) -> bool:
    return bool((values.half().float() == values).all())


def _check_input(x: torch.Tensor, k: int, dtype: torch.dtype, bias: torch.Tensor | None) -> None:
    if x.dtype != dtype or x.shape[-1] != k or x.dim() != 2 or x.stride(1) != 1:
        raise ConfigError(f"this matrix multiplies rows of {k} contiguous {dtype}, not {list(x.shape)} {x.dtype} by {list(x.stride())}")
    if bias is not None and (bias.dtype != dtype or not bias.is_contiguous()):
        raise ConfigError(f"the bias must be contiguous {dtype} as the activations are, not {bias.dtype}")


def _check_ids(ids: torch.Tensor) -> int:
    if ids.dtype not in (torch.int32, torch.int64) or ids.dim() != 1 or not ids.is_contiguous():
        raise ConfigError(f"token ids must be contiguous int32 or int64 [T], not {list(ids.shape)} {ids.dtype}")
    return DTYPES[ids.dtype]
