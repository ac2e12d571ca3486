"""Matrix products of the reference backend: dense, and packed weights dequantised on the fly."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minfer.kernels.ops import Weight
from minfer.quant import PackedWeight


class DenseWeight(Weight):
    """A plain [N, K] tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.shape = tensor.shape

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.tensor, bias)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tensor.index_select(0, ids)


class DequantizedWeight(Weight):
    """A packed matrix, dequantised anew at every use: the memory of the codes, the numbers of the formula, and no speed."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype) -> None:
        self.packed = packed
        self.dtype = dtype
        self.shape = packed.shape

    @property
    def nbytes(self) -> int:
        mins = 0 if self.packed.mins is None else self.packed.mins.nbytes
        return self.packed.codes.nbytes + self.packed.scales.nbytes + mins

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, self.packed.dequantize(x.dtype), bias)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        return self.packed.rows(ids).dequantize(self.dtype)
