"""Products and embeddings of the Triton backend against float64."""

from __future__ import annotations

import pytest
import torch
from kernels.devices import DEVICE, DTYPES, close, randn

from minfer.errors import ConfigError
from minfer.kernels.ops import Weight
from minfer.kernels.triton import TritonBackend


def prepare(matrix, dtype: torch.dtype) -> Weight:  # type: ignore[no-untyped-def]
    prepared = TritonBackend(DEVICE, dtype).prepare(matrix, dtype)
    assert isinstance(prepared, Weight), prepared
    return prepared


def linear_tolerance(dtype: torch.dtype, k: int) -> float:
    """Rounding of the output, and of k additions in float32."""
    return 4 * torch.finfo(dtype).eps + 2e-7 * k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 100), (48, 256), (16, 576)])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5])
def test_dense(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    matrix, x, bias = randn(n, k, dtype=dtype), randn(rows, k + 8, dtype=dtype, seed=1)[:, :k], randn(n, dtype=dtype, seed=2)
    weight = prepare(matrix, dtype)
    for b in (None, bias):
        expected = torch.nn.functional.linear(x.double(), matrix.double(), None if b is None else b.double())
        close(weight.linear(x, b), expected, linear_tolerance(dtype, k) * k**0.5)


def test_a_row_does_not_see_its_neighbours() -> None:
    weight, x = prepare(randn(24, 512), torch.float32), randn(2, 512, seed=1)
    three = torch.cat((x, x[:1]))
    out = weight.linear(three, None)
    assert torch.equal(out[0], out[2])


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_embedding(ids: torch.dtype) -> None:
    matrix = randn(40, 1100, dtype=torch.float16)
    wanted = torch.tensor([3, 39, 0, 3], dtype=ids, device=DEVICE)
    assert torch.equal(prepare(matrix, torch.float16).embedding(wanted), matrix[wanted.long()])


def test_what_it_refuses() -> None:
    weight = prepare(randn(8, 16), torch.float32)
    with pytest.raises(ConfigError, match=r"multiplies torch.float32 \[T, 16\], not torch.float32 \[1, 8\]"):
        weight.linear(randn(1, 8), None)
    with pytest.raises(ConfigError, match=r"bias must have shape \[8\]"):
        weight.linear(randn(1, 16), randn(16))
    assert "cast it first" in str(TritonBackend(DEVICE, torch.float32).prepare(randn(2, 2).half(), torch.float32))
