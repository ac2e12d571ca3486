"""Attention sinks: every backend against the attention of transformers' gpt-oss, in float64, request by request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.batches import make_batch, make_cache
from kernels.conftest import backend_of
from kernels.devices import DEVICE, close, moved, on_device

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels.cpu.library import ISAS, find, load
from minfer.kernels.reference import ReferenceBackend
from minfer.kvcache import LayerCache

MIXED = ((1, 37), (20, 20), (0, 5), (5, 170), (1, 1), (1, 140))
DIM, KV_HEADS, GROUP, SIZE = 32, 2, 4, 16


@pytest.fixture(params=["reference", "triton", *ISAS])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "reference":
        return ReferenceBackend()
    if request.param == "triton":
        return pytest.importorskip("minfer.kernels.triton").TritonBackend(DEVICE, torch.float32)
    if find() is None or not load().minfer_has_isa(request.param.encode()):
        pytest.skip(f"no compiled kernels for {request.param} here")
    return backend_of(request.param)


def theirs(q: torch.Tensor, cache: LayerCache, batch: Batch, scale: float, window: int | None, sinks: torch.Tensor) -> torch.Tensor:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    layer: Any = SimpleNamespace(num_key_value_groups=GROUP, sinks=sinks.double(), training=False)
    out, start = [], 0
    for table, new, total in zip(batch.block_tables.long(), batch.query_lens_host, batch.seq_lens_host, strict=True):
        at, key = torch.arange(total - new, total)[:, None], torch.arange(total)[None]
        hidden = (key > at) | (at - key >= (window or total))
        mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))[None, None]
        k, v = (pages[table].transpose(0, 1).flatten(1, 2)[None, :, :total].double() for pages in (cache.k, cache.v))
        rows = q[start : start + new].double().transpose(0, 1)[None]
        if new:
            out.append(eager_attention_forward(layer, rows, k, v, mask, scaling=scale)[0][0])
        start += new
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 9])
def test_as_gpt_oss_has_them(backend: Any, window: int | None) -> None:
    batch, cache = make_batch(MIXED, SIZE, 40), make_cache(40, KV_HEADS, SIZE, DIM, torch.float32)
    q = torch.randn(batch.num_tokens, KV_HEADS * GROUP, DIM, generator=torch.Generator().manual_seed(3))
    sinks = torch.linspace(-3, 4, KV_HEADS * GROUP)  # from hardly felt to taking nearly everything
    sinks[1] = 200.0
    there = DEVICE if getattr(backend, "name", "") == "triton" else torch.device("cpu")
    arguments = (on_device(cache), moved(batch)) if there == DEVICE else (cache, batch)
    got = backend.attention(q.to(there), *arguments, 0.4, window, None, sinks.to(there))
    close(got, theirs(q, cache, batch, 0.4, window, sinks))
    without = backend.attention(q.to(there), *arguments, 0.4, window)
    assert (without.cpu() - got.cpu()).abs().max() > 0.1


def test_the_compiled_kernels_take_float32_only(cpu: Any) -> None:
    batch, cache = make_batch([(1, 3)], SIZE, 2), make_cache(2, KV_HEADS, SIZE, DIM, torch.float32)
    with pytest.raises(ConfigError, match=r"sinks must be contiguous torch.float32 \[8\]"):
        cpu.attention(torch.zeros(1, 8, DIM), cache, batch, 1.0, sinks=torch.zeros(8, dtype=torch.float64))
