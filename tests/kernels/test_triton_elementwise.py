"""The small Triton ops against the reference in float64; what they refuse."""

from __future__ import annotations

import pytest
import torch
from kernels.devices import DEVICE, DTYPES, close, randn

from minfer.errors import ConfigError
from minfer.kernels.reference import ReferenceBackend
from minfer.kernels.triton import TritonBackend
from minfer.kvcache import LayerCache

REFERENCE = ReferenceBackend()
TRITON = TritonBackend(DEVICE, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 64), (2, 576), (5, 1000)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(rows: int, width: int, with_residual: bool, dtype: torch.dtype) -> None:
    x = randn(rows, width + 3, dtype=dtype)[:, :width]  # rows need not touch
    residual = randn(rows, width, dtype=dtype, seed=1) if with_residual else None
    weight = randn(width, dtype=dtype, seed=2)
    out, total = TRITON.rms_norm(x, weight, 1e-5, residual)
    expected_total = x if residual is None else x + residual
    expected, _ = REFERENCE.rms_norm(expected_total.double(), weight.double(), 1e-5, None)
    assert torch.equal(total, expected_total)
    close(out, expected, 2 * torch.finfo(dtype).eps * 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_heads", "k_heads", "dim"), [(1, 1, 2), (9, 3, 64), (4, 4, 80), (5, 1, 96), (2, 1, 256)])
def test_rotary(q_heads: int, k_heads: int, dim: int, dtype: torch.dtype) -> None:
    qkv = randn(4, q_heads + 2 * k_heads, dim, dtype=dtype)  # q and k are slices of one product
    q, k, v = qkv.split((q_heads, k_heads, k_heads), dim=1)
    positions = torch.tensor([0, 7, 30, 7], dtype=torch.int32, device=DEVICE)
    angles = torch.outer(torch.arange(31.0), torch.rand(dim // 2))
    table = torch.cat((angles.cos(), angles.sin()), -1).to(DEVICE)
    expected_q, expected_k, untouched = q.double(), k.double(), v.clone()
    REFERENCE.rotary(expected_q, expected_k, positions, table)
    TRITON.rotary(q, k, positions, table)
    close(q, expected_q, 4 * torch.finfo(dtype).eps)
    close(k, expected_k, 4 * torch.finfo(dtype).eps)
    assert torch.equal(v, untouched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "block_size"), [(1, 2, 1), (3, 64, 16), (8, 80, 4), (5, 256, 32)])
def test_write_kv(heads: int, dim: int, block_size: int, dtype: torch.dtype) -> None:
    kv = randn(3, 2 * heads, dim, dtype=dtype)
    k, v = kv.split(heads, dim=1)
    shape = (64 // block_size + 1, heads, block_size, dim)
    slots = torch.tensor([0, 63, 17], device=DEVICE)
    for cache_dtype in (dtype, torch.float32):
        got, expected = ([torch.zeros(shape, dtype=cache_dtype, device=DEVICE) for _ in range(2)] for _ in range(2))
        TRITON.write_kv(k, v, LayerCache(*got), slots)
        REFERENCE.write_kv(k.to(cache_dtype), v.to(cache_dtype), LayerCache(*expected), slots)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 96, 1024, 1500])
def test_act_mul(inner: int, dtype: torch.dtype) -> None:
    x = 4 * randn(3, 2 * inner, dtype=dtype)
    expected = REFERENCE.act_mul(x.double(), "silu")
    close(TRITON.act_mul(x, "silu"), expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("width", [1, 5, 4096, 9000])
def test_argmax_takes_the_first_of_equals(width: int) -> None:
    logits = randn(3, width)
    logits[0] = 0.5
    logits[1, [width // 3, width - 1]] = 9.0
    logits[2] = float("-inf")
    assert TRITON.argmax(logits).tolist() == [0, width // 3, 0]
    logits = randn(4, width + 7, seed=3)[:, :width]
    assert torch.equal(TRITON.argmax(logits), REFERENCE.argmax(logits))


def test_no_tokens_no_launch() -> None:
    none = torch.zeros(0, 8, device=DEVICE)
    assert TRITON.rms_norm(none, torch.ones(8, device=DEVICE), 1e-5)[0].shape == (0, 8)
    assert TRITON.act_mul(none, "silu").shape == (0, 4)
    assert TRITON.argmax(none).shape == (0,)


def test_what_a_kernel_cannot_read_is_named() -> None:
    x, weight = randn(4, 8), randn(8)
    with pytest.raises(ConfigError, match=r"x must be contiguous but for its first axis"):
        TRITON.rms_norm(x.t(), weight[:4], 1e-5)
    with pytest.raises(ConfigError, match=r"residual must be torch.float32"):
        TRITON.rms_norm(x, weight, 1e-5, x.half())
    with pytest.raises(ConfigError, match=r"weight must have shape \[8\]"):
        TRITON.rms_norm(x, weight[:7], 1e-5)
    with pytest.raises(ConfigError, match=r"x must be float32, bfloat16 or float16"):
        TRITON.act_mul(x.double(), "silu")
    with pytest.raises(ConfigError, match="knows silu, not 'gelu'"):
        TRITON.act_mul(x, "gelu")
    cache = LayerCache(torch.zeros(2, 1, 4, 8, device=DEVICE), torch.zeros(2, 1, 4, 8, device=DEVICE))
    with pytest.raises(ConfigError, match=r"slots must be contiguous torch.int64"):
        TRITON.write_kv(randn(4, 1, 8), randn(4, 1, 8), cache, torch.zeros(4, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ConfigError, match=r"cache.k must have shape \[2, 2, 4, 8\]"):
        TRITON.write_kv(randn(4, 2, 8), randn(4, 2, 8), cache, torch.zeros(4, dtype=torch.int64, device=DEVICE))
