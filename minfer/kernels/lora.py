"""`LoraWeights`: the LoRA adapters of one product, stacked so that one call serves rows of different adapters.

A LoRA adapter (Hu 2021) adds a product of two thin matrices to a big one: y = x W^T + scale (x A^T) B^T. Merged into W it would cost
nothing, but then a batch could have one adapter only; beside W, it costs r (K + N) multiplications a row, and every row may have its own
(Punica, Chen 2023; S-LoRA, Sheng 2023).

A stacked product (q, k and v in one) has a pair of matrices for each part, over the same inputs. The A's stand one under the other, so
that all parts' inner products are one; B's columns are the product's own.

    x [T, K] -> t [T, parts x R]          part p of t, R wide, belongs to the columns bounds[p] : bounds[p + 1] of y

R is the largest rank of all adapters, up to a power of two and 16 at least, because matrix instructions want it so; what is smaller is
filled up with zeros. Adapters keep their own type beside weights of any: a quantised matrix isn't touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

SMALLEST_RANK = 16


@dataclass(frozen=True, slots=True)
class LoraPart:
    """One adapter's matrices for one part: a [r, K], b [N of the part, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """Adapter number i of a batch, from 1, is entry i - 1 here. A part that an adapter leaves alone has rank 0."""

    a: torch.Tensor  # [adapters, parts * R, K]
    b: torch.Tensor  # [adapters, R, N], or as the backend whose `prepare_lora` it has been through stores it
    scales: torch.Tensor  # [adapters, parts] float32
    ranks: torch.Tensor  # [adapters, parts] int32, each at most R
    bounds: torch.Tensor  # [parts + 1] int32: the columns at which parts begin, and N
    columns: tuple[int, ...]  # `bounds` on the host
    rank: int  # R

    @property
    def parts(self) -> int:
        return len(self.columns) - 1

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    @staticmethod
    def stack(
        adapters: Sequence[Sequence[LoraPart | None]], inputs: int, outputs: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> LoraWeights:
        """`adapters[i][p]` is what adapter i + 1 adds to part p of a product of `inputs` and, by part, `outputs`."""
        largest = max(part.a.shape[0] for parts in adapters for part in parts if part is not None)
        rank, count = max(SMALLEST_RANK, 1 << (largest - 1).bit_length()), len(outputs)
        columns = [0]
        for size in outputs:
            columns.append(columns[-1] + size)
        a = torch.zeros(len(adapters), count * rank, inputs, dtype=dtype, device=device)
        b = torch.zeros(len(adapters), rank, columns[-1], dtype=dtype, device=device)
        scales = torch.zeros(len(adapters), count)
        ranks = torch.zeros(len(adapters), count, dtype=torch.int32)
        for number, parts in enumerate(adapters):
            for place, part in enumerate(parts):
                if part is None:
                    continue
                own = part.a.shape[0]
                a[number, place * rank : place * rank + own] = part.a
                b[number, :own, columns[place] : columns[place + 1]] = part.b.T
                scales[number, place], ranks[number, place] = part.scale, own
        bounds = torch.tensor(columns, dtype=torch.int32, device=device)
        return LoraWeights(a, b, scales.to(device), ranks.to(device), bounds, tuple(columns), rank)
