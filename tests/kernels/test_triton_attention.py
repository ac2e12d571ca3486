"""The ragged paged attention kernel against the reference in float64: every head size and ratio, every edge of a tile and a block."""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from kernels.batches import make_batch, make_cache
from kernels.devices import DEVICE, DTYPES, close, moved, on_device, randn
from kernels.kv_oracle import QUANTISED
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
@pytest.mark.parametrize("heads", [4, 8])
def test_where_keys_lie_does_not_show(stored: torch.dtype, heads: int, splits: int) -> None:
    """As `test_tails.py` asks of the other backends: the same bits. With 8 heads the rows of drafts take a wide tile."""
    q, cache, batch = contiguous(heads, 2, 16, stored)
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
@pytest.mark.parametrize("splits", [1, 3])
def test_prompts_and_chunks_at_the_edges(new: int, total: int, splits: int) -> None:
    check([(new, total)], 2, 1, 16, torch.float16, splits=splits, dirty=True)


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


VERIFIED = ((5, 513), (1, 700), (5, 516), (3, 130), (2, 2))  # drafts, one of which crosses into the last tile; and beside them


@pytest.mark.parametrize(
    "masks", [{}, {"window": 600}, {"window": 2, "softcap": 3.0}, {"softcap": 5.0, "sinks": torch.linspace(-2.0, 4.0, 8)}], ids=str
)
def test_drafts_over_a_long_context_are_split(masks: dict[str, Any]) -> None:
    """As the launches decide it, on a device of 100 processors."""
    batch, cache = make_batch(VERIFIED, 16, 128), make_cache(128, 2, 16, 16, torch.float32)
    q = randn(batch.num_tokens, 8, 16)
    exact = LayerCache(cache.k.double(), cache.v.double())
    expected = ReferenceBackend().attention(q.cpu().double(), exact, batch, 0.25, **masks)
    cache = LayerCache(*(pages.masked_fill(_unwritten(batch, pages), float("nan")) for pages in (cache.k, cache.v)))
    masks = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in masks.items()}
    one, many = (
        attention(q, on_device(cache), moved(batch), 0.25, processors=100, splits=splits, **masks) for splits in (1, None)
    )  # fmt: skip
    close(many, expected)
    assert torch.equal(one, many) == (masks.get("window") == 2), "what a window of two sees is not split"


@pytest.mark.parametrize("stored", QUANTISED)
def test_drafts_over_a_long_quantised_context_are_split(stored: torch.dtype) -> None:
    batch, cache = make_batch(VERIFIED, 16, 128), LayerCache.empty(128, 2, 16, 16, stored)
    plain = make_cache(128, 2, 16, 16, torch.float32)
    ReferenceBackend().write_kv(*(pages.transpose(1, 2).reshape(-1, 2, 16) for pages in (plain.k, plain.v)), cache, torch.arange(2048))
    q = randn(batch.num_tokens, 8, 16)
    expected = ReferenceBackend().attention(q.cpu().double(), cache, batch, 0.25)
    one, many = (attention(q, on_device(cache), moved(batch), 0.25, processors=100, splits=splits) for splits in (1, None))
    close(many, expected, 1e-5)
    assert not torch.equal(one, many)


class Launches:
    """In the place of a kernel: the grid and the constants of each launch."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: self.seen.append((grid, constants))


@pytest.mark.parametrize(
    ("lengths", "settings", "grid"),
    [
        ([(5, 16384)], {}, (1, 8, 49)),  # three programs of 64 rows for each of 132 processors
        ([(5, 16384)] * 8, {}, (10, 8, 6)),
        ([(5, 16384)] * 64, {}, (84, 8, 1)),
        ([(5, 16384)], {"ptx": False, "processors": 304}, (1, 8, 64)),  # no finer than 256 keys
        ([(5, 600)], {}, (1, 8, 2)),
        ([(5, 16384)], {"window": 1024}, (1, 8, 4)),
        ([(64, 16384)], {}, (3, 8, 8)),  # tiles of 128 rows: one program at a time
        ([(512, 8192)], {}, (17, 8, 1)),
        ([(2048, 2048)], {}, (65, 8, 1)),
    ],
)
def test_launches_follow_the_device(
    lengths: list[tuple[int, int]], settings: dict[str, Any], grid: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama3.1-8b's heads, bfloat16. The tiles of a grid are a bound; splits follow from those that have work."""
    launches, merges = Launches(), Launches()
    module = sys.modules["minfer.kernels.triton.attention"]
    monkeypatch.setattr(module, "attention_kernel", launches)
    monkeypatch.setattr(module, "merge_kernel", merges)
    batch, cache = make_batch(lengths, 16, 65536), LayerCache.empty(1, 8, 16, 128, torch.bfloat16, torch.device("meta"))
    for name in ("query_start", "seq_lens", "block_tables"):
        setattr(batch, name, getattr(batch, name).to("meta"))
    q = torch.empty(batch.num_tokens, 32, 128, dtype=torch.bfloat16, device="meta")
    attention(q, cache, batch, 0.1, **{"processors": 132, "shared": 227 * 1024, "ptx": True, **settings})
    ((launched, constants),) = launches.seen
    assert launched == grid
    assert constants["SPLITS"] == constants["PARTS"] == grid[2]
    assert len(merges.seen) == (grid[2] > 1)


def test_a_graphs_batch_brings_more_tokens_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket of 80 rows, up to 9 of each of 64 requests: 74 tiles of 16 rows at most, not 64 x 9 tokens' worth."""
    launches, module, meta = Launches(), sys.modules["minfer.kernels.triton.attention"], torch.device("meta")
    monkeypatch.setattr(module, "attention_kernel", launches)
    monkeypatch.setattr(module, "merge_kernel", Launches())
    start, lens, table = (torch.empty(shape, dtype=torch.int32, device=meta) for shape in (65, 64, (64, 512)))
    none = torch.empty(0, dtype=torch.int32, device=meta)
    batch = Batch(none, none, none, start, lens, table, none, [9] * 64, [8192] * 64)
    q = torch.empty(80, 8, 128, dtype=torch.bfloat16, device=meta)
    attention(q, LayerCache.empty(1, 1, 16, 128, torch.bfloat16, meta), batch, 0.1, processors=74, splits=None)
    assert launches.seen[0][0] == (80 // 8 + 64, 1, 2)


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
