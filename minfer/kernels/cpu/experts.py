"""A mixture of experts on the compiled backend: the experts' packed matrices in one table, and one op that goes through them.

Each expert keeps the matrices that `weights.py` packed for it, of any kind it packs, and mixed ones too. `moe.cpp` is told where they are,
so how many rows each gets is found out below Python and a step with experts is recorded like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minfer.errors import ConfigError
from minfer.kernels.cpu.runtime import DTYPES, Runtime
from minfer.kernels.cpu.weights import CpuStackedWeight, CpuWeight
from minfer.kernels.ops import Experts, Weight

MAX_EXPERTS = 1024  # kMostExperts in moe.cpp
SIGNATURE = (
    "ptr x, ptr logits, ptr shared, ptr shared_gate, ptr out, ptr matrices, ptr picked, ptr shares, ptr places, ptr inputs, ptr gate_up, "
    "ptr activated, ptr outputs, ptr sums, int rows, int width, int inner, int experts, int up_parts, int down_parts, int top_k, "
    "int renormalize, int x_stride, int logits_stride, int shared_stride, int gate_stride, int dtype"
)


class CpuExperts(Experts):
    def __init__(self, runtime: Runtime, gate_up: Sequence[Weight], down: Sequence[Weight]) -> None:
        self._runtime = runtime
        self._op = runtime.op("moe", SIGNATURE)
        self._weights = [*gate_up, *down]
        self.inner, self.width = down[0].shape[1], down[0].shape[0]
        self.count = len(down)
        self.parts = len(_parts(gate_up[0])), len(_parts(down[0]))
        # The structs Matrix of moe.cpp: all fields 8 bytes.
        fields = [field for first, last in zip(gate_up, down, strict=True) for weight in (first, last) for field in _fields(weight)]
        self._matrices = torch.tensor(fields, dtype=torch.int64)

    @staticmethod
    def reason_against(gate_up: Sequence[Weight], down: Sequence[Weight]) -> str | None:
        """Why the op can't go through these experts, if so."""
        if len(down) > MAX_EXPERTS:
            return f"goes through up to {MAX_EXPERTS} experts, not {len(down)}"
        for weights in (gate_up, down):
            if not all(isinstance(part, CpuWeight) for weight in weights for part in _parts(weight)):
                return "goes through experts only whose matrices it has packed itself"
            if len({len(_parts(weight)) for weight in weights}) > 1:
                return "goes through experts only that are cut into matrices alike"
        return None

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights)

    def moe(
        self,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        top_k: int,
        renormalize: bool,
        kind: str,
        shared: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        if kind != "silu":
            raise ConfigError(f"the cpu backend's moe knows silu, not {kind!r}")
        if not 1 <= top_k <= self.count:
            raise ConfigError(f"a token can go to 1 to {self.count} of {self.count} experts, not to {top_k}")
        rows, pairs, empty, ptr = x.shape[0], x.shape[0] * top_k, self._runtime.empty, self._runtime.ptr
        y, gate = shared or (None, None)
        for name, tensor, width in (("x", x, self.width), ("router_logits", router_logits, self.count), ("shared", y, self.width)):
            if tensor is not None and (tensor.dtype != x.dtype or tensor.shape != (rows, width) or tensor.stride(1) != 1):
                raise ConfigError(f"{name} must be contiguous rows [{rows}, {width}] of {x.dtype}, not {list(tensor.shape)} {tensor.dtype}")
        if gate is not None and (gate.dtype != x.dtype or gate.shape != (rows, 1)):
            raise ConfigError(f"the shared expert's gate must be [{rows}, 1] of {x.dtype}, not {list(gate.shape)} {gate.dtype}")
        out = empty((rows, self.width), x.dtype)
        routing = empty((pairs,), torch.int32), empty((pairs,), torch.float32), empty((pairs,), torch.int32)
        widths = (self.width, 2 * self.inner, self.inner, self.width)
        scratch = (*routing, *(empty((rows, width), x.dtype) for width in widths), empty((rows, self.width), torch.float32))
        pointers = map(ptr, (x, router_logits, y, gate, out, self._matrices, *scratch))
        sizes = (rows, self.width, self.inner, self.count, *self.parts, top_k, int(renormalize))
        strides = (x.stride(0), router_logits.stride(0), 0 if y is None else y.stride(0), 0 if gate is None else gate.stride(0))
        self._op(*pointers, *sizes, *strides, DTYPES[x.dtype])
        return out


def _parts(weight: Weight) -> list[Weight]:
    return list(weight.parts) if isinstance(weight, CpuStackedWeight) else [weight]


def _fields(weight: Weight) -> list[int]:
    fields, first = [], 0
    for part in _parts(weight):
        assert isinstance(part, CpuWeight), "reason_against has asked"
        fields += [*part.address, part.shape[0], first]
        first += part.shape[0]
    return fields
