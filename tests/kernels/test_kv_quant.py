"""Rows of the KV cache by their definition: codes are nearest, scales cover the row, and nothing but the row decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernels.batches import make_batch
from kernels.kv_oracle import LIMITS, QUANTISED, ROTATED, SEARCHED, codes_of, float8_values, rows_of, walsh_hadamard

from minfer.errors import ConfigError
from minfer.kernels.reference import ReferenceBackend
from minfer.kernels.reference.kv_quant import dequantize, hadamard, quantize
from minfer.kvcache import FORMATS, KVCache, LayerCache, format_of
from minfer.model_config import ModelConfig

DIMS = (2, 10, 64, 80, 96, 128, 256)


def rows_with_outliers(count: int, dim: int) -> torch.Tensor:
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(dim)) * torch.logspace(-3, 3, count)[:, None]
    rows[:, 1] *= 30  # a channel as keys have them
    return rows


@pytest.mark.parametrize("dim", DIMS)
def test_hadamard_is_sylvesters_and_its_own_inverse(dim: int) -> None:
    rows = rows_with_outliers(9, dim)
    np.testing.assert_allclose(hadamard(rows).numpy(), rows.double().numpy() @ walsh_hadamard(dim), rtol=0, atol=rows.abs().max() * 1e-6)
    torch.testing.assert_close(hadamard(hadamard(rows)), rows, rtol=0, atol=float(rows.abs().max()) * 1e-6)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", QUANTISED)
def test_codes_are_the_nearest(dtype: torch.dtype, dim: int) -> None:
    rows, limit = rows_with_outliers(50, dim), LIMITS[dtype]
    codes, scales = quantize(rows, format_of(dtype))
    assert codes.shape[-1] == format_of(dtype).width(dim)
    exact = rows.double().numpy() @ walsh_hadamard(dim) if dtype in ROTATED else rows.double().numpy()
    scale, top = scales.double().numpy(), np.abs(exact).max(-1)
    candidates = (8 + np.arange(8)) / 8 if dtype in SEARCHED else np.ones(1)
    np.testing.assert_array_less(np.abs(np.abs(scale)[:, None] / (top / limit)[:, None] - candidates).min(-1), 2**-7)  # bfloat16
    wanted, got = exact / scale[:, None], codes_of(codes)
    levels = np.arange(-8, 8) if dtype == torch.uint8 else np.arange(-127, 128) if dtype == torch.int8 else float8_values(dtype)
    levels = np.sort(levels[np.isfinite(levels)]).astype(np.float64)
    nearest = np.abs(wanted[..., None] - levels).min(-1)
    np.testing.assert_array_less(np.abs(got - wanted), nearest + 2e-5 * np.abs(wanted) + 1e-6)  # float32 arithmetic against ties
    if dtype == torch.uint8:
        assert (got.min(-1) == -8).all(), "the outermost number has the code -8"


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", QUANTISED)
def test_dequantised_rows(dtype: torch.dtype, dim: int) -> None:
    rows = rows_with_outliers(50, dim)
    codes, scales = quantize(rows, format_of(dtype))
    expected = rows_of(codes, scales)
    bound = np.abs(expected).max() * 1e-6
    np.testing.assert_allclose(dequantize(codes, scales, format_of(dtype)).numpy(), expected, rtol=1e-6, atol=bound)
    step = {torch.uint8: 1 / 7, torch.int8: 1 / 127, torch.float8_e4m3fn: 1 / 14, torch.float8_e5m2: 1 / 7}[dtype]
    error = np.linalg.norm(expected - rows.numpy(), axis=-1) / (np.abs(rows.numpy()).max(-1) * np.sqrt(dim))
    assert (error < step).all()


@pytest.mark.parametrize("dtype", SEARCHED)
def test_the_scale_of_an_8_bit_float_is_the_best_of_eight(dtype: torch.dtype) -> None:
    rows = rows_with_outliers(200, 64)
    exact, values = rows.double().numpy() @ walsh_hadamard(64), float8_values(dtype)
    values = np.sort(values[np.isfinite(values)])
    errors = []
    for factor in (8 + np.arange(8)) / 8:
        scale = torch.from_numpy(np.abs(exact).max(-1) / LIMITS[dtype] * factor).float().bfloat16().double().numpy()[:, None]
        at = np.clip(np.searchsorted((values[1:] + values[:-1]) / 2, exact / scale), 0, len(values) - 1)
        errors.append(((values[at] * scale - exact) ** 2).sum(-1))
    got = ((rows_of(*quantize(rows, format_of(dtype))) - rows.double().numpy()) ** 2).sum(-1)
    np.testing.assert_allclose(got, np.min(errors, axis=0), rtol=1e-3)
    assert got.sum() < 0.9 * errors[0].sum()


@pytest.mark.parametrize("dtype", QUANTISED)
def test_extreme_rows(dtype: torch.dtype) -> None:
    rows = torch.zeros(7, 16)
    rows[1, 3] = -5.0
    rows[2] = 1e37
    rows[3] = 1e-42  # its scale would be subnormal
    rows[4, 0] = float("nan")
    rows[5, 0] = float("inf")
    rows[6] = 1e-30
    codes, scales = quantize(rows, format_of(dtype))
    got = dequantize(codes, scales, format_of(dtype))
    assert (got[[0, 3]] == 0).all()
    # Rotated, a single spike is 16 numbers of one size, of which int4 reaches half only up to 7/8.
    torch.testing.assert_close(got[1], rows[1], rtol=2**-7, atol=5 / 14 if dtype == torch.uint8 else 0.05)
    for row in (2, 6):
        torch.testing.assert_close(got[row] / rows[row, 0], torch.ones(16), rtol=2**-6, atol=0)
    assert got[4].isnan().all(), "what is not a number must not look like one"
    assert not got[5].isfinite().all()


@pytest.mark.parametrize("dtype", QUANTISED)
def test_write_kv_touches_its_slots_only(dtype: torch.dtype) -> None:
    heads, dim, batch = 3, 20, make_batch([(5, 37), (1, 16), (40, 40), (1, 17)], 16, 12)
    cache = LayerCache.empty(12, heads, 16, dim, dtype)
    for tensor in cache.tensors:
        tensor.view(torch.uint8).fill_(85)
    k, v = (rows_with_outliers(batch.num_tokens * heads, dim).view(-1, heads, dim) + n for n in range(2))
    ReferenceBackend().write_kv(k, v, cache, batch.slots)
    written = torch.zeros(12 * 16, dtype=torch.bool)
    written[batch.slots] = True
    for rows, pages, scales in ((k, cache.k, cache.k_scale), (v, cache.v, cache.v_scale)):
        assert scales is not None
        codes, expected = quantize(rows, cache.format)
        flat = pages.view(torch.uint8).transpose(1, 2).flatten(0, 1)  # [slots, heads, width]
        assert torch.equal(flat[batch.slots], codes.view(torch.uint8))
        assert (flat[~written] == 85).all()
        assert torch.equal(scales.transpose(1, 2).flatten(0, 1)[batch.slots], expected)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 2, 10), (2, 1, 80)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, 5.0)])
def test_reference_attention_reads_what_is_stored(dtype, heads, kv_heads, dim, window, softcap) -> None:  # type: ignore[no-untyped-def]
    lengths = [(1, 30), (17, 17), (5, 33), (1, 1)]
    batch, cache = make_batch(lengths, 16, 12), LayerCache.empty(12, kv_heads, 16, dim, dtype)
    everyone = make_batch([(total, total) for _, total in lengths], 16, 12)
    k, v = (torch.randn(everyone.num_tokens, kv_heads, dim) for _ in range(2))
    ReferenceBackend().write_kv(k, v, cache, everyone.slots)
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    finite = [torch.from_numpy(np.nan_to_num(rows_of(*pair))) for pair in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))]
    q = torch.randn(batch.num_tokens, heads, dim)
    expected = ReferenceBackend().attention(q.double(), LayerCache(*finite), batch, dim**-0.5, window, softcap)
    for kind, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-6)):
        got = ReferenceBackend().attention(q.to(kind), cache, batch, dim**-0.5, window, softcap)
        assert got.dtype == kind
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=4 * tolerance)


MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=8,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_and_copies_include_the_scales(name: str) -> None:
    cache = KVCache(MODEL, 5, 4, FORMATS[name].dtype, torch.device("cpu"))
    assert sum(t.nbytes for layer in cache.layers for t in layer.tensors) == 5 * KVCache.block_bytes(MODEL, 4, cache.dtype)
    for layer in cache.layers:
        for tensor in layer.tensors:
            tensor.view(torch.uint8).copy_(torch.randint(0, 256, tensor.view(torch.uint8).shape))
    before = [t.view(torch.uint8).clone() for layer in cache.layers for t in layer.tensors]
    cache.copy_blocks([(1, 3), (0, 4)])
    for old, new in zip(before, (t.view(torch.uint8) for layer in cache.layers for t in layer.tensors), strict=True):
        assert torch.equal(new[[0, 1, 2, 3, 4]], old[[0, 1, 2, 1, 0]])


def test_how_much_more_fits() -> None:
    bytes_of = {name: kind.row_bytes(128) for name, kind in FORMATS.items()}
    assert bytes_of == {"fp32": 512, "bf16": 256, "fp16": 256, "fp8": 130, "fp8_e5m2": 130, "int8": 130, "int4": 66}


def test_impossible_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="head_dim must be even, not 5; use int8"):
        LayerCache.empty(1, 1, 16, 5, torch.uint8)
    with pytest.raises(ConfigError, match=r"can't be stored as torch\.int32; it takes fp32, bf16"):
        format_of(torch.int32)
