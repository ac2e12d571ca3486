"""The ragged paged attention kernel against the reference in float64: every head size and ratio, every edge of a tile and a block."""

from __future__ import annotations

import random

import pytest
import torch
from kernels.batches import make_batch, make_cache
from kernels.devices import DEVICE, DTYPES, close, moved, on_device, randn
from kernels.test_tails import contiguous, scattered

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels.reference import ReferenceBackend
from minfer.kernels.triton.attention import _splits, _tiles, attention
from minfer.kernels.triton.kv_codes import PLAIN
from minfer.kvcache import LayerCache

MIXED = ((1, 37), (20, 20), (0, 5), (5, 70), (1, 1))  # decode, prompt, nothing new, chunk, first token


def check(lengths, heads, kv_heads, dim, dtype, *, block_size=16, window=None, softcap=None, sinks=None, splits=None, dirty=False) -> None:  # type: ignore[no-untyped-def]
    blocks = sum(-(-total // block_size) for _, total in lengths) + 1
    batch, cache = make_batch(lengths, block_size, blocks), make_cache(blocks, kv_heads, block_size, dim, dtype)
    q = randn(batch.num_tokens, heads + 1, dim, dtype=dtype)[:, :heads]
    exact = LayerCache(cache.k.double(), cache.v.double())
    expected = ReferenceBackend().attention(q.cpu().double(), exact, batch, dim**-0.5, window, softcap, sinks)
    if dirty:  # slots that no request wrote may hold anything
        cache = LayerCache(*(pages.masked_fill(_unwritten(batch, pages), float("nan")) for pages in (cache.k, cache.v)))
    sinks = None if sinks is None else sinks.to(DEVICE)
    got = attention(q, on_device(cache), moved(batch), dim**-0.5, window, softcap, sinks, processors=4, splits=splits)
    close(got, expected)


def _unwritten(batch, pages: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    written = torch.zeros(pages.shape[0] * pages.shape[2], dtype=torch.bool)
    for table, total in zip(batch.block_tables.long(), batch.seq_lens_host, strict=True):
        at = torch.arange(total)
        written[table[at // pages.shape[2]] * pages.shape[2] + at % pages.shape[2]] = True
    return ~written.view(pages.shape[0], 1, pages.shape[2], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 80), (2, 2, 96), (8, 1, 128), (5, 1, 256), (7, 1, 16), (6, 1, 10)]
)
def test_heads(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    check(MIXED, heads, kv_heads, dim, dtype)


@pytest.mark.parametrize(("window", "softcap"), [(5, None), (1, None), (33, None), (1000, None), (None, 3.0), (7, 3.0)])
@pytest.mark.parametrize("splits", [1, 3])
def test_window_and_softcap(window: int | None, softcap: float | None, splits: int) -> None:
    check(MIXED, 4, 2, 32, torch.float32, window=window, softcap=softcap, splits=splits)


@pytest.mark.parametrize(("window", "softcap"), [(5, None), (None, 3.0), (None, None)])
@pytest.mark.parametrize("splits", [1, 3])
def test_sinks(window: int | None, softcap: float | None, splits: int) -> None:
    check(MIXED, 4, 2, 32, torch.float32, window=window, softcap=softcap, sinks=torch.tensor([-2.0, 0.0, 1.5, 30.0]), splits=splits)


@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
@pytest.mark.parametrize("splits", [1, 3])
def test_where_keys_lie_does_not_show(stored: torch.dtype, splits: int) -> None:
    """As `test_tails.py` asks of the other backends: the same bits."""
    q, cache, batch = contiguous(4, 2, 16, stored)
    there, branched = scattered(cache, batch)
    settings = {"processors": 4, "splits": splits, "ptx": False}
    expected = attention(q.to(DEVICE), on_device(cache), moved(batch), 0.25, **settings)
    assert expected.isfinite().all()
    assert torch.equal(attention(q.to(DEVICE), on_device(there), moved(branched), 0.25, **settings), expected)
    assert branched.tails is not None
    branched.tails[2, 1] = branched.tails[2, 2]
    assert not torch.equal(attention(q.to(DEVICE), on_device(there), moved(branched), 0.25, **settings), expected)


SHARED = [(1, 150), (3, 131), (1, 129), (20, 149), (0, 140), (1, 300)]


def sharing(tokens: int, lengths, kv_heads: int, dim: int):  # type: ignore[no-untyped-def]
    """A batch whose requests have their first tokens in the same blocks of 16, the same without that being said, and a cache."""
    batch, plain = make_batch(lengths, 16, 80), make_batch(lengths, 16, 80)
    for each in (batch, plain):
        each.block_tables[:, : tokens // 16] = each.block_tables[0, : tokens // 16]
    batch.shared, batch.shared_host = torch.tensor([tokens], dtype=torch.int32), tokens
    return batch, plain, make_cache(80, kv_heads, 16, dim, torch.float32)


@pytest.mark.parametrize("tokens", [16, 64, 80, 128])
@pytest.mark.parametrize("splits", [None, 1, 3])
def test_a_shared_prefix_is_attended_to_once(tokens: int, splits: int | None) -> None:
    batch, plain, cache = sharing(tokens, SHARED, 2, 32)
    q = randn(batch.num_tokens, 6, 32)
    sinks = torch.linspace(-2, 3, 6)
    expected = ReferenceBackend().attention(q.cpu().double(), LayerCache(cache.k.double(), cache.v.double()), plain, 0.3, None, 5.0, sinks)
    batch.block_tables[1:, : tokens // 64 * 4] = 79  # what is shared is read by way of the first request alone
    got = attention(q, on_device(cache), moved(batch), 0.3, None, 5.0, sinks.to(DEVICE), processors=4, splits=splits)
    close(got, expected)


def test_a_shared_prefix_and_other_layers() -> None:
    """With a window as if nothing were shared; beside drafts that branch, and over codes."""
    batch, plain, cache = sharing(64, SHARED, 2, 32)
    q = randn(batch.num_tokens, 4, 32)
    ours, theirs = (attention(q, on_device(cache), moved(each), 0.3, 20, processors=4) for each in (batch, plain))
    assert torch.equal(ours, theirs)
    coded = LayerCache.empty(80, 2, 16, 32, torch.uint8)
    ReferenceBackend().write_kv(
        cache.k.transpose(1, 2).reshape(-1, 2, 32), cache.v.transpose(1, 2).reshape(-1, 2, 32), coded, torch.arange(1280)
    )
    tails = torch.full((len(SHARED), 3), Batch.NO_TAIL)
    tails[2] = torch.tensor([127, 5, 1270])
    batch.tails = plain.tails = tails
    ours, theirs = (attention(q, on_device(coded), moved(each), 0.3, processors=4) for each in (batch, plain))
    close(ours, theirs)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("total", [1, 15, 16, 17, 63, 64, 65, 127, 129])
def test_single_tokens_at_the_edges(total: int, splits: int) -> None:
    check([(1, total), (1, 3)], 2, 1, 16, torch.float16, splits=splits, dirty=True)


@pytest.mark.parametrize(("new", "total"), [(15, 15), (16, 16), (17, 17), (63, 64), (64, 64), (65, 65), (2, 65), (33, 97)])
def test_prompts_and_chunks_at_the_edges(new: int, total: int) -> None:
    check([(new, total)], 2, 1, 16, torch.float16, dirty=True)


@pytest.mark.parametrize("block_size", [1, 4, 128])
def test_blocks_smaller_and_larger_than_a_tile(block_size: int) -> None:
    check(MIXED, 2, 1, 16, torch.float32, block_size=block_size, dirty=True)


@pytest.mark.parametrize("seed", range(12))
def test_any_batch(seed: int) -> None:
    rng = random.Random(seed)
    drawn = [(rng.randint(0, 20), rng.randint(0, 60)) for _ in range(rng.randint(1, 5))]
    lengths = [(1, 1), *((new, new + old) for new, old in drawn if new + old)]
    splits, window = rng.choice([None, 1, 2]), rng.choice([None, 3, 40])
    check(lengths, rng.randint(1, 8), 1, 16, torch.float32, splits=splits, window=window, dirty=True)


def test_many_processors_split_a_long_context() -> None:
    batch, cache = moved(make_batch([(1, 600)], 64, 10)), on_device(make_cache(10, 1, 64, 16, torch.float32))
    q = randn(1, 2, 16)
    one, many = attention(q, cache, batch, 0.25, processors=8, splits=1), attention(q, cache, batch, 0.25, processors=8)
    torch.testing.assert_close(one, many, rtol=1e-6, atol=1e-6)
    assert not torch.equal(one, many)  # three partial sums, added in another order


def test_offsets_beyond_32_bits() -> None:
    blocks = 2**31 // (16 * 64) + 9
    shape = (blocks, 1, 16, 64)
    far = LayerCache(*(torch.empty(shape, dtype=torch.float16, device=DEVICE) for _ in range(2)))
    near = on_device(make_cache(2, 1, 16, 64, torch.float16))
    batch = moved(make_batch([(1, 20)], 16, 2))
    q = randn(1, 1, 64, dtype=torch.float16)
    batch.block_tables[0] = torch.tensor([0, 1])
    expected = attention(q, near, batch, 0.125, processors=4)
    batch.block_tables[0] = torch.tensor([3, blocks - 1])
    for page, place in ((0, 3), (1, blocks - 1)):
        far.k[place], far.v[place] = near.k[page], near.v[page]
    assert torch.equal(attention(q, far, batch, 0.125, processors=4), expected)


def test_tiles_and_splits_follow_the_device() -> None:
    for new, rows in ((1, 16), (4, 16), (5, 64), (16, 64), (17, 128)):
        assert _tiles(4, 128, new, 2, PLAIN, 227 * 1024)[0] == rows
    assert _tiles(4, 128, 40, 2, PLAIN, 64 * 1024)[0] == 64
    assert _tiles(40, 128, 1, 2, PLAIN, 64 * 1024)[0] == 64
    assert [_splits(8, 32768, 132, ptx) for ptx in (True, False)] == [66, 33]
    assert [_splits(512, 4096, 132, ptx) for ptx in (True, False)] == [1, 1]
    assert _splits(8, 512, 132, True) == 2


def test_nothing_to_do() -> None:
    cache, batch = on_device(make_cache(2, 1, 16, 64, torch.float16)), moved(make_batch([], 16, 2))
    assert attention(randn(0, 1, 64, dtype=torch.float16), cache, batch, 1.0, processors=4).shape == (0, 1, 64)


def test_what_it_refuses() -> None:
    cache, batch = on_device(make_cache(2, 2, 16, 64, torch.float16)), moved(make_batch([(1, 3)], 16, 2))
    with pytest.raises(ConfigError, match="3 query heads can't share 2 KV heads"):
        attention(randn(1, 3, 64, dtype=torch.float16), cache, batch, 1.0, processors=4)
    with pytest.raises(ConfigError, match="up to 256 values, not 512"):
        attention(randn(1, 2, 512, dtype=torch.float16), cache, batch, 1.0, processors=4)
    batch.seq_lens = batch.seq_lens.long()
    with pytest.raises(ConfigError, match=r"seq_lens must be contiguous torch.int32"):
        attention(randn(1, 2, 64, dtype=torch.float16), cache, batch, 1.0, processors=4)
