"""The small Triton ops against the reference in float64; what they refuse."""

from __future__ import annotations

import pytest
import torch
from kernels.devices import DEVICE, DTYPES, close, randn

from minfer.errors import ConfigError
from minfer.kernels.reference import ReferenceBackend
from minfer.kernels.triton import TritonBackend

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
