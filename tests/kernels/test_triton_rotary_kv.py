"""q rotated, k rotated and stored, v stored, in one launch: q against float64, what is stored to the last bit; norms against float64."""

from __future__ import annotations

import pytest
import torch
from kernels.devices import DEVICE, DTYPES, close, on_device, randn
from kernels.kv_oracle import rows_of

from minfer.errors import ConfigError
from minfer.kernels.ops import HeadNorms
from minfer.kernels.reference import ReferenceBackend
from minfer.kernels.triton import TritonBackend
from minfer.kvcache import FORMATS, LayerCache

REFERENCE, TRITON = ReferenceBackend(), TritonBackend(DEVICE, torch.float16)
UNWRITTEN = 0xC3
POSITIONS = 31
SLOTS = (63, -1, 0, 17)  # one row is padding; the others are out of order, at the ends of blocks and in the middle

SHAPES = [(1, 1, 2, 1), (9, 3, 64, 16), (4, 4, 80, 4), (5, 1, 96, 16), (16, 2, 128, 32), (9, 9, 256, 64)]
STORED = [name for name in FORMATS if name != "bf16" or torch.bfloat16 in DTYPES]
CASES = [*((shape, form) for shape in SHAPES for form in ("fp16", "int8")), *((SHAPES[1], form) for form in STORED)]
CASES += [(SHAPES[2], "fp8"), (SHAPES[3], "fp8_e5m2"), (SHAPES[4], "int4")]


def table_of(dim: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(float(POSITIONS)), 0.1 + torch.rand(dim // 2, generator=torch.Generator().manual_seed(3)))
    return torch.cat((angles.cos(), angles.sin()), -1)


def filled(heads: int, dim: int, block_size: int, dtype: torch.dtype) -> LayerCache:
    cache = LayerCache.empty(64 // block_size, heads, block_size, dim, dtype)
    for tensor in cache.tensors:
        tensor.view(torch.uint8).fill_(UNWRITTEN)
    return cache


def bits(cache: LayerCache) -> list[torch.Tensor]:
    return [tensor.cpu().view(torch.uint8) for tensor in cache.tensors]


def expected_of(k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, cache: LayerCache) -> None:
    """The reference's, of k rotated in float32 and rounded to its type once."""
    real = torch.tensor(SLOTS) >= 0
    turned = k.cpu().float().clone()
    REFERENCE.rotary(turned.clone(), turned, positions.cpu(), table_of(k.shape[2]))
    pair = (turned.to(k.dtype), v.cpu())
    if cache.format.limit is None:  # the interpreter cuts a float32 off where a bfloat16 ends
        pair = tuple(rows.to(cache.k.dtype) for rows in pair)
    REFERENCE.write_kv(*(rows[real] for rows in pair), cache, torch.tensor(SLOTS)[real])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "form"), dict.fromkeys(CASES))
def test_rotary_kv(shape: tuple[int, int, int, int], form: str, dtype: torch.dtype) -> None:
    q_heads, heads, dim, block_size = shape
    product = randn(len(SLOTS), (q_heads + 2 * heads) * dim + 8, dtype=dtype)  # q, k and v are slices of one product of wider rows
    q, k, v = product[:, :-8].unflatten(1, (-1, dim)).split((q_heads, heads, heads), dim=1)
    positions = torch.tensor([30, 5, 7, 1], dtype=torch.int32, device=DEVICE)
    got, expected = (filled(heads, dim, block_size, FORMATS[form].dtype) for _ in range(2))
    got = on_device(got)
    expected_of(k, v, positions, expected)
    expected_q, untouched = q.double().cpu(), v.clone()
    REFERENCE.rotary(expected_q, k.double().cpu(), positions.cpu(), table_of(dim))
    TRITON.rotary_kv(q, k, v, positions, table_of(dim).to(DEVICE), got, torch.tensor(SLOTS, device=DEVICE))
    close(q, expected_q, 4 * torch.finfo(dtype).eps)
    assert torch.equal(v, untouched)
    for ours, theirs in zip(bits(got), bits(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_heads", "heads", "dim"), [(17, 3, 128), (4, 1, 80), (1, 1, 2)])
def test_heads_are_normalised_before_they_turn(q_heads: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    q, k, v = (10 * randn(len(SLOTS), q_heads + 2 * heads, dim, dtype=dtype)).split((q_heads, heads, heads), dim=1)
    k[2, 0] = 0.0  # nothing but epsilon to divide by
    positions, slots = torch.tensor([30, 5, 7, 1], dtype=torch.int32, device=DEVICE), torch.tensor(SLOTS, device=DEVICE)
    weights = randn(dim, dtype=dtype, seed=4), randn(dim, dtype=dtype, seed=5)
    wide, real = [x.double().cpu() for x in (q, k, v)], slots.cpu() >= 0
    expected = LayerCache(*(torch.zeros(4, heads, 16, dim, dtype=torch.float64) for _ in range(2)))
    wide_weights = (weights[0].double().cpu(), weights[1].double().cpu(), 1e-3)
    rows = [x[real] for x in wide]
    REFERENCE.rotary_kv(*rows, positions.cpu()[real], table_of(dim).double(), expected, slots.cpu()[real], wide_weights)
    for form in (FORMATS["fp32" if dtype == torch.float32 else "fp16"], FORMATS["int8"]):
        turned, got = q.clone(), on_device(filled(heads, dim, 16, form.dtype))
        TRITON.rotary_kv(turned, k, v, positions, table_of(dim).to(DEVICE), got, slots, (*weights, 1e-3))
        close(turned[real.to(DEVICE)], rows[0], 16 * torch.finfo(dtype).eps)
        at = slots.cpu()[real]
        if got.k_scale is None:
            stored, step = got.k.cpu().double(), torch.zeros(())
        else:
            stored = torch.from_numpy(rows_of(got.k.cpu(), got.k_scale.cpu()))
            step = got.k_scale.cpu().double()[at // 16, :, at % 16, None]
        wrong = (stored - expected.k)[at // 16, :, at % 16].abs()
        assert (wrong <= 0.51 * step + 16 * torch.finfo(dtype).eps * expected.k.abs().max()).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored_turns_by_its_position(dtype: torch.dtype) -> None:
    """Against complex numbers in float64: a pair is a number, and its angle grows by that of its position."""
    dim, angles = 64, torch.linspace(0.01, 1.5, 32, dtype=torch.float64)
    table = torch.outer(torch.arange(8, dtype=torch.float64), angles)
    k, positions = randn(8, 2, dim, dtype=dtype), torch.tensor([7, 0, 3, 3, 1, 6, 2, 5], dtype=torch.int64, device=DEVICE)
    cache = on_device(filled(2, dim, 16, dtype))
    expected = torch.complex(*k.cpu().double().chunk(2, -1)) * torch.polar(torch.ones(1).double(), table)[positions.cpu()][:, None]
    rope = torch.cat((table.cos(), table.sin()), -1).float().to(DEVICE)
    TRITON.rotary_kv(k.clone(), k, k.clone(), positions, rope, cache, torch.arange(16, 24, device=DEVICE))
    stored = cache.k[1, :, :8].transpose(0, 1)
    close(stored, torch.cat((expected.real, expected.imag), -1), 4 * torch.finfo(dtype).eps)


def test_offsets_beyond_32_bits() -> None:
    """K and V share memory that nobody touches but for one row, which is the same in both."""
    dim, block_size = 64, 16
    blocks = 2**31 // (block_size * dim) + 2
    pages = torch.empty((blocks, 1, block_size, dim), dtype=torch.float16, device=DEVICE)
    k, slot = randn(1, 1, dim, dtype=torch.float16), torch.tensor([blocks * block_size - 1], device=DEVICE)
    still, table = torch.zeros(1, dtype=torch.int32, device=DEVICE), table_of(dim).to(DEVICE)
    TRITON.rotary_kv(k.clone(), k, k, still, table, LayerCache(pages, pages), slot)
    assert torch.equal(pages[-1, 0, -1], k[0, 0])


def test_no_rows_launch_nothing() -> None:
    none = torch.zeros(0, 1, 64, device=DEVICE)
    cache = on_device(filled(1, 64, 16, torch.float32))
    TRITON.rotary_kv(none, none, none, torch.zeros(0, dtype=torch.int32, device=DEVICE), table_of(64).to(DEVICE), cache,
                     torch.zeros(0, dtype=torch.int64, device=DEVICE))  # fmt: skip
    assert all((tensor == UNWRITTEN).all() for tensor in bits(cache))


def test_what_it_cannot_read_is_named() -> None:
    def call(cache: LayerCache, norms: HeadNorms | None = None, **changed: torch.Tensor) -> None:
        heads = {name: randn(4, cache.kv_heads, 8) for name in "qkv"}
        indices = {name: torch.zeros(4, dtype=dtype, device=DEVICE) for name, dtype in (("positions", torch.int32), ("slots", torch.int64))}
        arguments = heads | indices | {"table": torch.zeros(1, 8, device=DEVICE)} | changed
        TRITON.rotary_kv(*(arguments[name] for name in ("q", "k", "v", "positions", "table")), cache, arguments["slots"], norms)

    cache = on_device(filled(1, 8, 4, torch.float32))
    call(cache)
    with pytest.raises(ConfigError, match=r"slots must be contiguous torch.int64"):
        call(cache, slots=torch.zeros(4, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ConfigError, match=r"slots must have shape \[4\]"):
        call(cache, slots=torch.zeros(3, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ConfigError, match=r"positions must be contiguous torch.int32 or torch.int64"):
        call(cache, positions=torch.zeros(4, dtype=torch.float32, device=DEVICE))
    with pytest.raises(ConfigError, match=r"rotary table must be contiguous float32 \[positions, 8\]"):
        call(cache, table=torch.zeros(1, 6, device=DEVICE))
    with pytest.raises(ConfigError, match=r"v must have shape \[4, 1, 8\]"):
        call(cache, v=randn(4, 2, 8))
    with pytest.raises(ConfigError, match=r"k must be torch.float32"):
        call(cache, k=randn(4, 1, 8, dtype=torch.float16))
    with pytest.raises(ConfigError, match=r"q must be contiguous but for its first axis"):
        call(cache, q=randn(4, 8, 2).transpose(1, 2))
    with pytest.raises(ConfigError, match=r"k's weight must have shape \[8\]"):
        call(cache, norms=(randn(8), randn(7), 1e-5))
    with pytest.raises(ConfigError, match=r"cache.k must have shape \[16, 2, 4, 8\]"):
        call(LayerCache(cache.k, cache.v), q=randn(4, 2, 8), k=randn(4, 2, 8), v=randn(4, 2, 8))
