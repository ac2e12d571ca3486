"""Keys that lie elsewhere: a drafted branch's attention is, to the bit, that of the sequence it would be if its drafts were right."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from kernels.batches import make_batch
from kernels.conftest import backend_of
from kernels.kv_oracle import QUANTISED

from minfer.batch import Batch
from minfer.kernels.cpu.library import ISAS, find, load
from minfer.kernels.reference import ReferenceBackend
from minfer.kvcache import LayerCache

BLOCKS, SIZE = 64, 16
# (new tokens, tokens in all, how many of the last ones lie elsewhere), around the edges of tiles and blocks.
ROWS = ((5, 60, 0), (1, 40, 1), (1, 131, 5), (1, 128, 3), (1, 17, 17), (3, 300, 9), (1, 1, 1))


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return ReferenceBackend()
    if find() is None or not load().minfer_has_isa(request.param.encode()):
        pytest.skip(f"no compiled kernels for {request.param} here")
    return backend_of(request.param)


def contiguous(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, LayerCache, Batch]:
    """Queries, a cache in which every key lies where the block table says, and the batch."""
    cache = LayerCache.empty(BLOCKS, kv_heads, SIZE, dim, dtype)
    for tensor in cache.tensors:
        tensor.view(torch.uint8).fill_(0xFF)  # NaN, where there are any: what was never written must never matter
    batch = make_batch([(new, total) for new, total, _ in ROWS], SIZE, BLOCKS)
    everyone = make_batch([(total, total) for _, total, _ in ROWS], SIZE, BLOCKS)
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(everyone.num_tokens, kv_heads, dim, generator=generator) for _ in range(2))
    ReferenceBackend().write_kv(k, v, cache, everyone.slots)
    return torch.randn(batch.num_tokens, heads, dim, generator=generator), cache, batch


def scattered(cache: LayerCache, batch: Batch) -> tuple[LayerCache, Batch]:
    """The same with the tails' keys in other slots, and nothing usable where they lay."""
    used = {int(block) for row, (_, total, _) in enumerate(ROWS) for block in batch.block_tables[row, : -(-total // SIZE)]}
    spare = [slot for slot in range(BLOCKS * SIZE) if slot // SIZE not in used]
    random.Random(2).shuffle(spare)
    tails = torch.zeros(len(ROWS), 1 + max(tail for *_, tail in ROWS), dtype=torch.int64)
    moved = LayerCache(*(tensor.clone() for tensor in cache.tensors))
    for row, (_, total, tail) in enumerate(ROWS):
        tails[row, 0] = total - tail if tail else Batch.NO_TAIL
        for index in range(tail):
            at = total - tail + index
            block, within, slot = int(batch.block_tables[row, at // SIZE]), at % SIZE, spare.pop()
            tails[row, 1 + index] = slot
            for new, old in zip(moved.tensors, cache.tensors, strict=True):
                codes = new.dtype.itemsize == 1
                raw, source = (tensor.view(torch.uint8) if codes else tensor for tensor in (new, old))
                raw[slot // SIZE, :, slot % SIZE] = source[block, :, within]
                raw[block, :, within] = 0xFF if codes else torch.nan
    branched = make_batch([(new, total) for new, total, _ in ROWS], SIZE, BLOCKS)
    branched.tails = tails
    return moved, branched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *QUANTISED], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, 5.0)])
def test_where_keys_lie_does_not_show(backend: Any, dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    q, cache, batch = contiguous(9, 3, 64, dtype)
    moved, branched = scattered(cache, batch)
    expected = backend.attention(q, cache, batch, 0.125, window, softcap)
    assert expected.isfinite().all()
    assert torch.equal(backend.attention(q, moved, branched, 0.125, window, softcap), expected)
    assert branched.tails is not None
    branched.tails[2, 1] = branched.tails[2, 2]
    assert not torch.equal(backend.attention(q, moved, branched, 0.125, window, softcap), expected)
