"""The compiled kernels over a quantised cache: the reference's codes to the bit, float64 attention over what they stand for, and
the same bits however a prompt is cut."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from kernels.batches import make_batch
from kernels.conftest import backend_of
from kernels.kv_oracle import QUANTISED, rows_of

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels.cpu import CpuBackend
from minfer.kernels.reference import ReferenceBackend
from minfer.kvcache import LayerCache

TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
HEADS = ((9, 3, 64), (8, 8, 128), (7, 1, 80), (4, 2, 96), (2, 1, 256), (4, 2, 10), (1, 1, 2))
MIXED = ((1, 300), (200, 200), (37, 500), (5, 129), (1, 1), (3, 128), (1, 257))
BLOCKS = 120


def written(
    cpu: CpuBackend, lengths: tuple[tuple[int, int], ...], kv_heads: int, dim: int, dtype: torch.dtype, block_size: int = 16
) -> LayerCache:
    """A cache into which the kernels wrote every token of these requests, with keys that have an outlying channel."""
    blocks = BLOCKS * 16 // block_size
    cache = LayerCache.empty(blocks, kv_heads, block_size, dim, dtype)
    for tensor in cache.tensors:
        tensor.view(torch.uint8).fill_(0xFF)  # a scale of NaN: what was never written must never matter
    everyone = make_batch([(total, total) for _, total in lengths], block_size, blocks)
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.randn(everyone.num_tokens, kv_heads, dim, generator=generator) for _ in range(2))
    k[..., 1] *= 4
    cpu.write_kv(k, v, cache, everyone.slots)
    return cache


def exact_attention(
    q: torch.Tensor, cache: LayerCache, batch: Batch, scale: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Softmax attention written out in float64 over what the cache stands for."""
    assert cache.k_scale is not None
    assert cache.v_scale is not None
    k, v = (torch.from_numpy(rows_of(*pair)) for pair in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)))
    out, start = torch.empty(q.shape, dtype=torch.float64), batch.query_start.tolist()
    for r, (new, total) in enumerate(zip(batch.query_lens_host, batch.seq_lens_host, strict=True)):
        at = torch.arange(total)
        blocks, offsets = batch.block_tables[r].long()[at // cache.block_size], at % cache.block_size
        group = q.shape[1] // cache.kv_heads
        keys, values = (pages[blocks, :, offsets].repeat_interleave(group, dim=1) for pages in (k, v))  # [L, Hq, D]
        scores = torch.einsum("qhd,khd->hqk", q[start[r] : start[r + 1]].double(), keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(total - new, total)[:, None] - at
        hidden = (behind < 0) | (behind >= (window or total))
        out[start[r] : start[r + 1]] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
    return out


def stored(backend: CpuBackend | ReferenceBackend, heads: int, dim: int, kind: torch.dtype, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """What a backend makes of rows of all sizes, and leaves of what was there."""
    batch = make_batch([(70, 90), (1, 16), (1, 17)], 16, 12)
    wide = torch.randn(batch.num_tokens, 2 * heads + 1, dim, generator=torch.Generator().manual_seed(dim))
    wide *= torch.logspace(-6, 6 if dtype != torch.float16 else 3, batch.num_tokens)[:, None, None]
    wide[0], wide[1, :, 1:], wide[2], wide[3] = 0.0, 0.0, 1.0, 1e-42
    wide = wide.to(dtype)
    cache = LayerCache.empty(12, heads, 16, dim, kind)
    for tensor in cache.tensors:
        tensor.view(torch.uint8).fill_(85)
    backend.write_kv(wide[:, :heads], wide[:, heads : 2 * heads], cache, batch.slots)
    return tuple(cache.tensors)


@functools.cache  # one for all instruction sets: the search for fp8 scales in plain torch takes longer than the rest
def stored_by_reference(heads: int, dim: int, kind: torch.dtype, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return stored(ReferenceBackend(), heads, dim, kind, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", QUANTISED)
def test_codes_are_the_references(cpu: CpuBackend, kind: torch.dtype, dtype: torch.dtype) -> None:
    for heads, dim in ((3, 64), (1, 80), (2, 96), (1, 256), (2, 10), (1, 2), (40, 128)):
        pairs = zip(stored(cpu, heads, dim, kind, dtype), stored_by_reference(heads, dim, kind, dtype), strict=True)
        for got, expected in pairs:
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), (heads, dim)


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_is_not_a_number_stays_none(cpu: CpuBackend, kind: torch.dtype) -> None:
    batch, cache = make_batch([(3, 3)], 16, 1), LayerCache.empty(1, 1, 16, 64, kind)
    k = torch.ones(3, 1, 64)
    k[1, 0, 17], k[2, 0, 5] = float("nan"), float("inf")
    cpu.write_kv(k, k, cache, batch.slots)
    assert cache.k_scale is not None
    assert cache.k_scale[0, 0, :3].isfinite().tolist() == [True, False, False]
    assert not cpu.attention(torch.ones(3, 1, 64), cache, batch, 0.1)[1:].isfinite().any()


Variant = tuple[int | None, float | None]  # window, softcap


def queries(heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    tokens = sum(new for new, _ in MIXED)
    return torch.randn(tokens, heads + 1, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)[:, :heads]


@functools.cache  # one for all instruction sets
def exactly(heads: int, kv_heads: int, dim: int, kind: torch.dtype, dtype: torch.dtype, variant: Variant) -> torch.Tensor:
    cache = written(backend_of("portable"), MIXED, kv_heads, dim, kind)
    return exact_attention(queries(heads, dim, dtype), cache, make_batch(MIXED, 16, BLOCKS), dim**-0.5, *variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", QUANTISED)
def test_against_float64(cpu: CpuBackend, kind: torch.dtype, dtype: torch.dtype) -> None:
    """All instruction sets store the same codes (`test_codes_are_the_references`), so what is exact is the same for all."""
    for heads, kv_heads, dim in HEADS:
        cache, batch = written(cpu, MIXED, kv_heads, dim, kind), make_batch(MIXED, 16, BLOCKS)
        q = queries(heads, dim, dtype)
        variants: tuple[Variant, ...] = ((None, None), (100, None), (3, 5.0)) if dim == 64 else ((70, None),)
        for window, softcap in variants:
            got = cpu.attention(q, cache, batch, dim**-0.5, window, softcap)
            expected = exactly(heads, kv_heads, dim, kind, dtype, (window, softcap))
            # A score of s has the error of a rounded query, s / 256 in bfloat16, and the rotation rounds queries once more.
            torch.testing.assert_close(got.double(), expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("kind", QUANTISED)
def test_lengths_around_edges(cpu: CpuBackend, kind: torch.dtype, length: int) -> None:
    for block_size in (1, 16, 256):
        cache = written(cpu, ((1, length),), 2, 32, kind, block_size)
        batch = make_batch([(1, length)], block_size, BLOCKS * 16 // block_size)
        q = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(
            cpu.attention(q, cache, batch, 0.2).double(), exact_attention(q, cache, batch, 0.2, None, None), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", QUANTISED)
def test_prompt_in_one_piece_in_chunks_and_token_by_token(cpu: CpuBackend, kind: torch.dtype, dtype: torch.dtype) -> None:
    length = 300
    for (heads, kv_heads, dim), window in (((9, 3, 64), None), ((7, 1, 80), 70), ((4, 2, 10), None)):
        cache = written(cpu, ((1, length),), kv_heads, dim, kind)
        q = torch.randn(length, heads, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)
        whole = cpu.attention(q, cache, make_batch([(length, length)], 16, BLOCKS), 0.1, window)
        for chunk in (1, 2, 7, 33, 128):
            for end in range(chunk, length + 1, chunk * 5):
                part = cpu.attention(q[end - chunk : end], cache, make_batch([(chunk, end)], 16, BLOCKS), 0.1, window)
                assert torch.equal(part, whole[end - chunk : end]), (chunk, end)


@pytest.mark.parametrize("kind", QUANTISED)
def test_neighbours_and_threads_do_not_show(cpu: CpuBackend, kind: torch.dtype) -> None:
    heads, kv_heads, dim = 9, 3, 64
    cache, batch = written(cpu, MIXED, kv_heads, dim, kind), make_batch(MIXED, 16, BLOCKS)
    q = torch.randn(batch.num_tokens, heads, dim).bfloat16()
    together, start = cpu.attention(q, cache, batch, 0.125), batch.query_start.tolist()
    alone = backend_of(cpu.runtime.isa, threads=1)
    for r, (new, total) in enumerate(MIXED):
        single = make_batch([(new, total)], 16, BLOCKS)
        single.block_tables.copy_(batch.block_tables[r : r + 1, : single.block_tables.shape[1]])
        mine = slice(start[r], start[r + 1])
        assert torch.equal(alone.attention(q[mine], cache, single, 0.125), together[mine]), (new, total)


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_oracle_sees_a_wrong_scale(cpu: CpuBackend, kind: torch.dtype) -> None:
    lengths = ((1, 40), (20, 40))
    cache, batch = written(cpu, lengths, 1, 64, kind), make_batch(lengths, 16, BLOCKS)
    q = torch.randn(batch.num_tokens, 2, 64)
    got = cpu.attention(q, cache, batch, 0.125).double()
    assert cache.v_scale is not None
    block, offset = int(batch.slots[0]) // 16, int(batch.slots[0]) % 16
    cache.v_scale[block, 0, offset] *= 3
    error = (got - exact_attention(q, cache, batch, 0.125, None, None)).abs().amax((1, 2)).numpy()
    assert error[0] > 1e-3
    np.testing.assert_array_less(error[1:], 1e-5)


def test_odd_heads_are_refused(cpu: CpuBackend) -> None:
    cache = LayerCache.empty(1, 1, 16, 5, torch.int8)
    with pytest.raises(ConfigError, match="even head_dim up to 1024, not 5"):
        cpu.write_kv(torch.zeros(1, 1, 5), torch.zeros(1, 1, 5), cache, torch.zeros(1, dtype=torch.int64))
