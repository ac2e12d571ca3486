"""Matrices in the layouts of the compiled products, and how a matrix gets there.

`LinearKernels.prepare` packs a matrix once, at load: a quantised one keeps its codes, scales and minima exactly as they
are (nothing is rounded again), a dense one its values. Scales that came as float16, as those of most files did, are stored
as float16, which saves a sixth of what decoding 4-bit codes reads. linear_tile.h and linear_dense.cpp describe the layouts.

How a quantised matrix meets its activations is chosen here too. `int8`: each token's activations are rounded to int8 in
groups of 32 (of 16 where the weights' groups are finer) and the products are exact integers (llama.cpp does the same with its
Q8_1); `none`: activations stay as they are and codes are multiplied as bfloat16 or float32 numbers, as 8-bit floats always are.

Inputs in another order (act-order) cost one look-up as a row is made ready. The same look-up pads groups that 16 doesn't
divide: their extra columns meet zeros.

Left out: groups of fewer than 8 inputs, 8-bit floats with minima, and dense matrices in another type than the activations'; the
next backend in the list takes those.
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
from minfer.quant.elements import decode, has_nonfinite

Activation = Literal["int8", "none"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PANEL = 32  # columns that are stored together
UNIT = 32  # inputs that share a scale of the activations, where the weights' groups allow it
SMALLEST_UNIT = 16
SMALLEST_GROUP = 8  # below, padding would make more of a matrix than it saves
MANTISSA_BITS = {"fp8_e4m3": 3, "fp8_e5m2": 2}


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
        weight = weight.widened()
        element = weight.scheme.element
        if element in MANTISSA_BITS and weight.mins is not None:
            return "has no kernel for 8-bit floats with minima"
        if element in MANTISSA_BITS and has_nonfinite(weight.codes, element):
            return "has no kernel for 8-bit floats that aren't finite"
        if element not in ("int4", "int8", *MANTISSA_BITS) and weight.table is None:
            return f"has no kernel for {element}"
        if weight.scheme.group_size < SMALLEST_GROUP:
            return f"groups must be of {SMALLEST_GROUP} inputs or more, not {weight.scheme.group_size}"
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

    @property
    @abstractmethod
    def address(self) -> tuple[bool, int]:
        """Whether it is quantised, and where the kernels find it."""

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

    @property
    def address(self) -> tuple[bool, int]:
        return False, self._data.data_ptr()

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

    Codes that index a table (NF4, FP4, IQ4_NL) are 4 bits like any others. The table takes the type that is multiplied: bfloat16
    (which rounds NF4's by at most 1/512) or int8: exact where the values are multiples of one number, as those of FP4 and IQ4
    are, otherwise rounded to 1/127 of the largest.
    """

    def __init__(self, kernels: LinearKernels, packed: PackedWeight, dtype: torch.dtype) -> None:
        super().__init__(kernels)
        self.shape = packed.shape
        self.dtype = dtype
        codebook = _Codebook(packed, dtype, kernels.activation)
        columns = _Columns(packed)
        group, half = self._pack(packed, columns, codebook)
        self._levels, self._table, self._order = codebook.levels, codebook.table, columns.order
        # The struct QuantizedWeight of linear_weight.h: all fields 8 bytes.
        addresses = [0 if t is None else t.data_ptr() for t in (self._panels, self._levels, self._table, self._order)]
        fields = [*addresses, self.shape[0], columns.count, self.shape[1], codebook.bits, codebook.mantissa, columns.unit, group]
        fields += [codebook.offset, packed.mins is not None, half, DTYPES[codebook.value_dtype]]
        self._struct = torch.tensor([int(field) for field in fields], dtype=torch.int64)

    def _pack(self, packed: PackedWeight, columns: _Columns, codebook: _Codebook) -> tuple[int, bool]:
        """Fills `_panels`; returns the group as stored (the unit times a power of two) and whether float16 held the scales."""
        n, k, groups = packed.shape[0], columns.count, packed.scales.shape[1]
        parts = columns.group // columns.unit
        group = columns.unit * (parts & -parts)  # a group of 96 is stored as three of 32 with the same scale
        scales = (packed.scales.float() * codebook.unit).contiguous()
        mins = None if packed.mins is None else packed.mins.float().contiguous()
        half = _fits_half(scales) and (mins is None or _fits_half(mins))
        code_bytes = k * PANEL * codebook.bits // 8
        panel_bytes = code_bytes + (k // group) * PANEL * (1 if mins is None else 2) * (2 if half else 4)
        self._panels = self._kernels.arena.empty(_padded(n) // PANEL * panel_bytes, torch.uint8)
        codes, start = columns.pad(packed.codes, 0).contiguous(), self._panels.data_ptr()
        self._kernels.pack_codes(codes.data_ptr(), start, panel_bytes, n, k, codebook.bits, codebook.shift)
        address = 0 if mins is None else mins.data_ptr()
        repeat = columns.group // group
        self._kernels.pack_scales(scales.data_ptr(), address, start + code_bytes, panel_bytes, n, groups, repeat, half)
        return group, half

    @property
    def nbytes(self) -> int:
        return self._panels.nbytes

    @property
    def address(self) -> tuple[bool, int]:
        return True, self._struct.data_ptr()

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


class _Codebook:
    """What codes stand for as the kernels see it: value = unit * level, the unit being moved into the scales."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype, activation: Activation) -> None:
        element, table = packed.scheme.element, packed.table
        self.mantissa = MANTISSA_BITS.get(element, 0)
        self.bits = 8 if element == "int8" or self.mantissa else 4
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self.value_dtype = torch.int8 if activation == "int8" and not self.mantissa else wide  # of x inside the product
        self.unit = 1.0
        self.offset = self.shift = 0  # what int8 dots have in their codes beyond the level; what is added as codes are packed
        self.levels: torch.Tensor | None = None
        self.table: torch.Tensor | None = None
        if self.mantissa:
            self.unit = {3: 2.0**8, 2: 2.0**16}[self.mantissa]  # leaves room for the exponent bits, see linear_simd_avx512.h
            bits = torch.arange(256, dtype=torch.uint8).view(torch.int8)
            self.levels = decode(bits, element, None) / self.unit
        elif table is not None:
            self.levels = torch.tensor(table, dtype=torch.float32)
            if self.value_dtype == torch.bfloat16:
                self.levels = self.levels.bfloat16().float()
            if self.value_dtype == torch.int8:
                self.unit, self.offset = _int8_unit(table), 128
                self.levels = torch.round(self.levels / self.unit)
                self.table = (self.levels + 128).to(torch.uint8)
        else:
            self.offset = 128 if self.bits == 8 else 8 if packed.scheme.symmetric else 0
            self.shift = self.offset
            self.levels = torch.arange(16, dtype=torch.float32) - self.offset if self.bits == 4 else None


class _Columns:
    """Which input each stored column of codes meets: K of them as they come, or more where groups have to be padded.

    unit: inputs whose activations share a scale. group: columns of a group as stored. order: int32 [count], -1 for a column that
    meets nothing; None if columns are the inputs.
    """

    def __init__(self, packed: PackedWeight) -> None:
        k, self._size = packed.shape[1], packed.scheme.group_size
        self.unit = UNIT if self._size % UNIT == 0 or self._size > 4 * UNIT else SMALLEST_UNIT
        if packed.scheme.element in MANTISSA_BITS:
            self.unit = UNIT
        self.group = -(-self._size // self.unit) * self.unit
        self.count = k // self._size * self.group
        self.order: torch.Tensor | None = None
        if packed.input_order is not None or self.count != k:
            order = torch.arange(k) if packed.input_order is None else packed.input_order
            self.order = self.pad(order[None].int(), -1)[0].contiguous()

    def pad(self, values: torch.Tensor, fill: int) -> torch.Tensor:
        """[N, K] -> [N, count]"""
        if self.group == self._size:
            return values
        groups = values.unflatten(1, (-1, self._size))
        return torch.nn.functional.pad(groups, (0, self.group - self._size), value=fill).flatten(1)


def _int8_unit(table: Sequence[float]) -> float:
    """The largest number that all values are exact multiples of, up to 127 times; failing that, 1/127 of the largest value."""
    largest = max(abs(value) for value in table)
    exact = (2.0**-power for power in range(8))
    return next((unit for unit in exact if largest <= 127 * unit and all(value % unit == 0 for value in table)), largest / 127 or 1.0)


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
