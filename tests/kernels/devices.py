"""Where the Triton kernels are tested: on the GPU if there is one, else on CPU tensors under Triton's interpreter."""

from __future__ import annotations

import dataclasses

import torch

from minfer.batch import Batch
from minfer.kvcache import LayerCache

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter's bfloat16 is wrong in sums and products; a GPU's is what models run in.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def moved(batch: Batch) -> Batch:
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(**{name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in fields.items()})


def on_device(cache: LayerCache) -> LayerCache:
    return LayerCache(*(None if tensor is None else tensor.to(DEVICE) for tensor in (cache.k, cache.v, cache.k_scale, cache.v_scale)))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Against the float64 reference, within the rounding of the type."""
    limit = TOLERANCE[got.dtype] if tolerance is None else tolerance
    torch.testing.assert_close(got.double().cpu(), expected.double().cpu(), rtol=limit, atol=limit)
