"""Compiled attention: against the reference in float64, and against itself cut in every other way, bit for bit."""

from __future__ import annotations

import functools

import pytest
import torch
from kernels.batches import make_batch, make_cache
from kernels.conftest import backend_of

from minfer.kernels.cpu import CpuBackend
from minfer.kernels.reference import ReferenceBackend
from minfer.kvcache import LayerCache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Probabilities and outputs are rounded to the type, and so are q, k and v before (the oracle sees them rounded).
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
HEADS = ((9, 3, 64), (8, 8, 128), (7, 1, 80), (4, 2, 10), (1, 1, 2))
MIXED = ((1, 300), (200, 200), (37, 500), (5, 129), (1, 1), (3, 128), (1, 257))


def attend(cpu: CpuBackend, q: torch.Tensor, cache: LayerCache, lengths, blocks: int, block_size: int, window=None, softcap=None):  # type: ignore[no-untyped-def]
    return cpu.attention(q, cache, make_batch(lengths, block_size, blocks), q.shape[2] ** -0.5, window, softcap)


@functools.cache
def inputs(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[LayerCache, torch.Tensor]:
    tokens = sum(new for new, _ in MIXED)
    q = torch.randn(tokens, heads + 1, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)[:, :heads]
    return make_cache(120, kv_heads, 16, dim, dtype), q


@functools.cache  # one for all instruction sets
def exactly(heads: int, kv_heads: int, dim: int, window: int | None, softcap: float | None, dtype: torch.dtype) -> torch.Tensor:
    cache, q = inputs(heads, kv_heads, dim, dtype)
    exact = LayerCache(cache.k.double(), cache.v.double())
    return ReferenceBackend().attention(q.double(), exact, make_batch(MIXED, 16, 120), dim**-0.5, window, softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, None), (3, 5.0)])
def test_against_float64(cpu: CpuBackend, heads: int, kv_heads: int, dim: int, window, softcap, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    cache, q = inputs(heads, kv_heads, dim, dtype)
    got = cpu.attention(q, cache, make_batch(MIXED, 16, 120), dim**-0.5, window, softcap)
    expected = exactly(heads, kv_heads, dim, window, softcap, dtype)
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_lengths_around_edges(cpu: CpuBackend, length: int, block_size: int, dtype: torch.dtype) -> None:
    blocks = -(-length // block_size) + 1
    cache = make_cache(blocks, 2, block_size, 32, dtype)
    # What lies past a sequence's end was never written: it may be anything.
    batch = make_batch([(1, length)], block_size, blocks)
    keep = torch.zeros(blocks * block_size, dtype=torch.bool)
    positions = torch.arange(length)
    keep[batch.block_tables[0][positions // block_size].long() * block_size + positions % block_size] = True
    gone = ~keep.view(blocks, 1, block_size, 1)
    dirty = LayerCache(cache.k.masked_fill(gone, float("nan")), cache.v.masked_fill(gone, float("nan")))
    q = torch.randn(1, 4, 32).to(dtype)
    exact = LayerCache(cache.k.double(), cache.v.double())
    expected = ReferenceBackend().attention(q.double(), exact, batch, 0.2)
    torch.testing.assert_close(cpu.attention(q, dirty, batch, 0.2).double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (70, None), (None, 5.0)])
def test_prompt_in_one_piece_in_chunks_and_token_by_token(cpu: CpuBackend, heads, kv_heads, dim, window, softcap, dtype) -> None:  # type: ignore[no-untyped-def]
    length, blocks = 300, 20
    cache = make_cache(blocks, kv_heads, 16, dim, dtype)
    q = torch.randn(length, heads, dim).to(dtype)
    whole = attend(cpu, q, cache, [(length, length)], blocks, 16, window, softcap)
    for chunk in (1, 2, 7, 33, 128):
        for end in range(chunk, length + 1, chunk * 5):
            part = attend(cpu, q[end - chunk : end], cache, [(chunk, end)], blocks, 16, window, softcap)
            # Blocks are drawn from one permutation, so the same request finds the same blocks at every length.
            assert torch.equal(part, whole[end - chunk : end]), (chunk, end)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_threads_and_blocks_do_not_show(cpu: CpuBackend, dtype: torch.dtype) -> None:
    heads, kv_heads, dim, blocks = 9, 3, 64, 120
    cache = make_cache(blocks, kv_heads, 16, dim, dtype)
    batch = make_batch(MIXED, 16, blocks)
    q = torch.randn(batch.num_tokens, heads, dim).to(dtype)
    together = cpu.attention(q, cache, batch, 0.125)
    alone = backend_of(cpu.runtime.isa, threads=1)
    start = batch.query_start.tolist()
    for r, (new, total) in enumerate(MIXED):
        single = make_batch([(new, total)], 16, blocks)
        single.block_tables.copy_(batch.block_tables[r : r + 1, : single.block_tables.shape[1]])
        mine = slice(start[r], start[r + 1])
        assert torch.equal(alone.attention(q[mine], cache, single, 0.125), together[mine]), (new, total)


def test_offsets_beyond_32_bits(cpu: CpuBackend) -> None:
    # A cache of more than 2^32 bytes of which only two blocks are ever touched.
    blocks = 2**31 // (16 * 64) + 9
    shape = (blocks, 1, 16, 64)
    cache = LayerCache(torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape, dtype=torch.bfloat16))
    batch = make_batch([(1, 20)], 16, 2)
    batch.block_tables[0] = torch.tensor([3, blocks - 1])
    small = make_cache(2, 1, 16, 64, torch.bfloat16)
    for page, far in ((0, 3), (1, blocks - 1)):
        cache.k[far], cache.v[far] = small.k[page], small.v[page]
    near = make_batch([(1, 20)], 16, 2)
    near.block_tables[0] = torch.tensor([0, 1])
    q = torch.randn(1, 1, 64).bfloat16()
    assert torch.equal(cpu.attention(q, cache, batch, 0.125), cpu.attention(q, small, near, 0.125))


def test_empty_batch(cpu: CpuBackend) -> None:
    cache = make_cache(2, 1, 16, 64, torch.bfloat16)
    assert cpu.attention(torch.zeros(0, 1, 64).bfloat16(), cache, make_batch([], 16, 2), 1.0).shape == (0, 1, 64)
