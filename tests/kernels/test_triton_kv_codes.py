"""The quantised KV cache of the Triton backend: stored as the reference stores it, bit for bit, and read by attention."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernels.batches import make_batch
from kernels.devices import DEVICE, DTYPES, close, moved, on_device, randn
from kernels.kv_oracle import QUANTISED, SEARCHED, codes_of, float8_values, rows_of
from kernels.ptx import evaluate, halves

from minfer.errors import ConfigError
from minfer.kernels.reference import ReferenceBackend
from minfer.kernels.triton import TritonBackend, kv_codes
from minfer.kvcache import LayerCache, format_of

REFERENCE, TRITON = ReferenceBackend(), TritonBackend(DEVICE, torch.float16)


def empty(blocks: int, heads: int, block_size: int, dim: int, dtype: torch.dtype) -> LayerCache:
    cache = LayerCache.empty(blocks, heads, block_size, dim, dtype)
    for tensor in cache.tensors:
        tensor.view(torch.uint8).fill_(0xC3)  # what was never written: no NaN to hide behind
    return cache


def bits(cache: LayerCache) -> list[torch.Tensor]:
    return [tensor.cpu().view(torch.uint8) for tensor in cache.tensors]


def write(k: torch.Tensor, v: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
    """Stores k and v as they are: every token stands at position 0, where nothing turns."""
    rows, _, dim = k.shape
    still = torch.cat((torch.ones(dim // 2), torch.zeros(dim // 2)))[None].to(DEVICE)
    TRITON.rotary_kv(torch.zeros_like(k), k, v, torch.zeros(rows, dtype=torch.int32, device=DEVICE), still, cache, slots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", QUANTISED)
@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 64), (2, 80)])
def test_codes_are_the_references(heads: int, dim: int, stored: torch.dtype, dtype: torch.dtype) -> None:
    if stored == torch.uint8 and dim & (dim - 1):
        pytest.skip("int4 takes heads of a power of two here")
    kv = randn(10, 2 * heads, dim, dtype=torch.float32)
    kv *= torch.logspace(-4, 3, 10, device=DEVICE)[:, None, None]
    kv[3] = 0.0
    kv[4, 0] = 1e-41  # its scale would be subnormal
    kv[5, :, 1] *= 30
    kv[6, 0, :2] = 2.0  # two that are outermost
    k, v = kv.to(dtype).split(heads, dim=1)
    slots = torch.randperm(16, generator=torch.Generator().manual_seed(1))[:10].to(DEVICE)
    got, expected = (empty(1, heads, 16, dim, stored) for _ in range(2))
    got = on_device(got)
    write(k, v, got, slots)
    REFERENCE.write_kv(k.cpu(), v.cpu(), expected, slots.cpu())
    for ours, theirs in zip(bits(got), bits(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stored", QUANTISED)
def test_every_neighbourhood_of_a_code(stored: torch.dtype) -> None:
    """Values on, and just beside, every tie between two codes."""
    limit = format_of(stored).limit
    assert limit is not None
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    levels = codes.view(stored).float() if stored.is_floating_point else torch.arange(-127.0, 128.0)
    levels = levels[levels.isfinite()].unique()
    ties = (levels[1:] + levels[:-1]) / 2
    points = torch.cat((levels, ties, torch.nextafter(ties, ties + 1e9), torch.nextafter(ties, ties - 1e9)))
    rows = torch.full((-(-len(points) // 127), 128), limit)
    rows[:, 1:].flatten()
    padded = torch.zeros(rows.shape[0] * 127)
    padded[: len(points)] = points
    rows[:, 1:] = padded.view(-1, 127)
    k = rows[:, None].contiguous().to(DEVICE)
    slots = torch.arange(rows.shape[0], device=DEVICE)
    got, expected = on_device(empty(1, 1, 64, 128, stored)), empty(1, 1, 64, 128, stored)
    write(k, k, got, slots)
    REFERENCE.write_kv(k.cpu(), k.cpu(), expected, slots.cpu())
    for ours, theirs in zip(bits(got), bits(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stored", QUANTISED)
def test_a_row_with_a_nan_says_so_and_harms_no_other(stored: torch.dtype) -> None:
    k = randn(3, 2, 64)
    k[1, 0, 7] = float("nan")
    got, expected = on_device(empty(1, 2, 4, 64, stored)), empty(1, 2, 4, 64, stored)
    slots = torch.arange(3, device=DEVICE)
    write(k, k, got, slots)
    REFERENCE.write_kv(k.cpu(), k.cpu(), expected, slots.cpu())
    assert got.k_scale is not None and expected.k_scale is not None
    assert torch.equal(got.k_scale.cpu().isnan(), expected.k_scale.isnan())
    clean = ~expected.k_scale.isnan()
    assert torch.equal(bits(got)[0][clean], bits(expected)[0][clean])


MIXED = ((1, 37), (20, 20), (0, 5), (5, 70), (1, 1))


@pytest.mark.parametrize("stored", QUANTISED)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 80)])
@pytest.mark.parametrize(
    ("dtype", "splits", "masks"), [(torch.float16, 3, {}), (torch.float32, 2, {"window": 5, "softcap": 3.0}), (DTYPES[-1], 1, {})]
)
def test_attention(heads, kv_heads, dim, stored, dtype, splits, masks) -> None:  # type: ignore[no-untyped-def]
    from minfer.kernels.triton.attention import attention

    if stored == torch.uint8 and dim & (dim - 1):
        pytest.skip("int4 takes heads of a power of two here")
    batch, blocks = make_batch(MIXED, 16, 16), 16
    cache = empty(blocks, kv_heads, 16, dim, stored)
    for tensor in (cache.k_scale, cache.v_scale):
        assert tensor is not None
        tensor.fill_(float("nan"))  # of slots that nobody wrote
    for table, total in zip(batch.block_tables.long(), batch.seq_lens_host, strict=True):
        at = torch.arange(total)
        k, v = (randn(total, kv_heads, dim, seed=seed).cpu() for seed in (5, 6))
        REFERENCE.write_kv(k, v, cache, table[at // 16] * 16 + at % 16)
    q = randn(batch.num_tokens, heads, dim, dtype=dtype)
    assert cache.k_scale is not None and cache.v_scale is not None
    plain = LayerCache(*(torch.from_numpy(rows_of(*pair)) for pair in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))))
    expected = REFERENCE.attention(q.cpu().double(), plain, batch, dim**-0.5, **masks)
    ours = LayerCache(*(tensor.to(DEVICE) for tensor in (cache.k, cache.v, cache.k_scale, cache.v_scale)))
    got = attention(q, ours, moved(batch), dim**-0.5, processors=4, splits=splits, ptx=TRITON.target.nvidia, **masks)
    close(got, expected, {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}[dtype])


@pytest.mark.parametrize("stored", QUANTISED)
def test_small_scales_keep_their_digits_in_float16(stored: torch.dtype) -> None:
    """The scale of small values is below float16's normal numbers, and so is its product with a probability."""
    from minfer.kernels.triton.attention import attention

    batch, cache = make_batch([(1, 64)], 64, 1), empty(1, 1, 64, 16, stored)
    REFERENCE.write_kv(torch.zeros(64, 1, 16), 1e-5 * (10 + randn(64, 1, 16).cpu()), cache, torch.arange(64))
    assert cache.v_scale is not None
    expected = torch.from_numpy(rows_of(cache.v, cache.v_scale)).mean((0, 1, 2))
    got = attention(
        torch.zeros(1, 1, 16, dtype=torch.float16, device=DEVICE), on_device(cache), moved(batch), 0.25, processors=4, splits=1,
        ptx=TRITON.target.nvidia,
    )  # fmt: skip
    close(got[0, 0], expected, 1e-4 * 2**-9)


@triton.jit
def _numbers(stored_ptr, out_ptr, KIND: tl.constexpr):
    at = tl.arange(0, 256)
    number = kv_codes.kv_numbers(tl.load(stored_ptr + at), KIND, 0, False, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, number)


@pytest.mark.parametrize("stored", SEARCHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_code_of_a_small_float_is_read(stored: torch.dtype, dtype: torch.dtype) -> None:
    codes, out = torch.arange(256, dtype=torch.uint8, device=DEVICE), torch.empty(256, dtype=dtype, device=DEVICE)
    kind = kv_codes.kind_of(format_of(stored))
    _numbers[(1,)](codes, out, kind)
    expected = torch.from_numpy(float8_values(stored)) * kv_codes.number_unit(kind)
    real = expected.isfinite()
    assert torch.equal(out.cpu().double()[real], expected[real])


@triton.jit
def _codes(x_ptr, out_ptr, KIND: tl.constexpr, LIMIT: tl.constexpr):
    at = tl.arange(0, 1024)
    tl.store(out_ptr + at, kv_codes.kv_codes(tl.load(x_ptr + at), KIND, LIMIT))


@pytest.mark.parametrize("stored", SEARCHED)
def test_small_floats_are_rounded_to_the_even_one_of_two(stored: torch.dtype) -> None:
    """Rows are rotated, so what is stored hardly meets a tie; here is every one, and its neighbours."""
    levels = torch.from_numpy(float8_values(stored)).float()
    levels = levels[levels.isfinite()].unique()
    ties = (levels[1:] + levels[:-1]) / 2
    points = torch.cat((levels, ties, torch.nextafter(ties, ties + 1e9), torch.nextafter(ties, ties - 1e9)))
    x = torch.zeros(1024)
    x[: len(points)] = points
    out = torch.empty(1024, dtype=torch.uint8, device=DEVICE)
    form = format_of(stored)
    _codes[(1,)](x.to(DEVICE), out, kv_codes.kind_of(form), form.limit)
    expected = x.to(stored)
    assert torch.equal(out.cpu().view(stored).float(), expected.float())


@pytest.mark.parametrize(
    ("text", "stored", "dtype"),
    [
        (kv_codes.E4M3_AS_BFLOAT16, torch.float8_e4m3fn, torch.bfloat16),
        (kv_codes.E4M3_AS_FLOAT16, torch.float8_e4m3fn, torch.float16),
        (kv_codes.E5M2_AS_BFLOAT16, torch.float8_e5m2, torch.bfloat16),
        (kv_codes.E5M2_AS_FLOAT16, torch.float8_e5m2, torch.float16),
    ],
)
def test_the_assembly_reads_every_code(text: tl.constexpr, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Four codes in a register, each place with other neighbours."""
    code = torch.arange(256)
    lanes = [code, (code * 7 + 3) % 256, 255 - code, (code + 128) % 256]
    words = sum(lane << (8 * place) for place, lane in enumerate(lanes))
    got = [half for register in evaluate(text.value, [words], outputs=2) for half in halves(register, dtype)]
    values = torch.from_numpy(float8_values(stored)) * kv_codes.number_unit(kv_codes.kind_of(format_of(stored)))
    for lane, numbers in zip(lanes, got, strict=True):
        real = values[lane].isfinite()
        assert torch.equal(numbers[real], values[lane][real])


def test_the_scale_of_a_small_float_is_the_best_of_eight() -> None:
    """Not always the first, or the search would be for nothing; and never worse than it."""
    k = randn(64, 1, 64)
    cache = on_device(empty(1, 1, 64, 64, torch.float8_e4m3fn))
    write(k, k, cache, torch.arange(64, device=DEVICE))
    assert cache.k_scale is not None
    turned = rows_of(cache.k.cpu(), cache.k_scale.cpu())[0, 0]
    outermost = torch.from_numpy(codes_of(cache.k.cpu())).abs().amax(-1)
    assert len(set(outermost.flatten().tolist())) > 2
    assert ((torch.from_numpy(turned) - k[:, 0].cpu().double()).norm(dim=-1) < 0.04 * k[:, 0].cpu().double().norm(dim=-1)).all()


def test_what_it_refuses() -> None:
    cache = on_device(empty(1, 1, 16, 80, torch.uint8))
    with pytest.raises(ConfigError, match="heads of a power of two in int4, not of 80; use kv_cache_dtype int8"):
        write(randn(1, 1, 80), randn(1, 1, 80), cache, torch.zeros(1, dtype=torch.int64, device=DEVICE))
    bare = LayerCache(*(torch.zeros(1, 1, 16, 64, dtype=torch.int8, device=DEVICE) for _ in range(2)))
    with pytest.raises(ConfigError, match="in int8 must have bfloat16 scales"):
        write(randn(1, 1, 64), randn(1, 1, 64), bare, torch.zeros(1, dtype=torch.int64, device=DEVICE))
