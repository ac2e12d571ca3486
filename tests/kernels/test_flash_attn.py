"""FlashAttention behind the attention op: its arguments mean what the reference computes, and what it can't do is refused in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels import flash_attn_standin
from kernels.batches import make_batch, make_cache

from minfer import LLM, SamplingParams
from minfer.batch import Batch
from minfer.config import EngineConfig
from minfer.errors import ConfigError
from minfer.kernels import flash_attn, select_ops
from minfer.kernels.flash_attn import FlashAttnBackend
from minfer.kernels.reference import ReferenceBackend
from minfer.kvcache import LayerCache
from minfer.runner import BatchBuilder, RowSpan
from minfer.runner.buckets import Buckets
from minfer.runner.graphs import can_capture_on_gpu
from minfer.runner.upload import copy_later

CPU = torch.device("cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU and the package."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_standin)
    monkeypatch.setattr(flash_attn, "unfit", lambda device: None)


@pytest.mark.parametrize("lengths", [[(1, 300), (1, 256), (1, 7)], [(5, 5), (5, 257)], [(3, 520), (1, 1), (40, 296)], [(0, 9), (1, 300)]])
@pytest.mark.parametrize("masks", [{}, {"window": 5}, {"window": 1}, {"softcap": 3.0}, {"window": 270, "softcap": 30.0}])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 3, 80)])
def test_it_is_asked_for_what_the_reference_computes(
    installed: None, heads: int, kv_heads: int, dim: int, masks: dict[str, Any], lengths: list[tuple[int, int]]
) -> None:
    backend = FlashAttnBackend(CPU, torch.float16)
    batch, cache = make_batch(lengths, 256, 9), make_cache(9, kv_heads, 256, dim, torch.float16)
    generator = torch.Generator().manual_seed(1)
    product = torch.randn(batch.num_tokens, heads + 2 * kv_heads, dim, generator=generator).half()
    q = product[:, :heads]  # a slice, as layers have it
    got = backend.attention(q, cache, batch, 0.1, **masks)
    wide = type(cache)(cache.k.double(), cache.v.double())
    expected = ReferenceBackend().attention(q.double(), wide, batch, 0.1, **masks)
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected, rtol=2**-10, atol=2**-12)


def test_no_rows(installed: None) -> None:
    batch, cache = make_batch([], 256, 1), make_cache(1, 1, 256, 8, torch.float16)
    assert FlashAttnBackend(CPU, torch.float16).attention(torch.empty(0, 2, 8).half(), cache, batch, 1.0).shape == (0, 2, 8)


PROMPTS = [{"prompt_token_ids": [(7 * i * i + 3 * start) % 490 + 3 for i in range(length)]} for start, length in enumerate((253, 1, 40))]


def generate(folder: Path, **options: Any) -> list[list[int]]:
    llm = LLM(str(folder), backend="reference", dtype="float16", max_model_len=300, kv_cache_memory=2**22, block_size=256, **options)
    chosen = llm.engine.core.loaded.ops.chosen
    assert chosen.pop("attention") == options.get("attention_backend", "reference") and set(chosen.values()) == {"reference"}
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def test_an_engine_says_what_the_reference_says(installed: None, make_checkpoint: Callable[..., Path]) -> None:
    """Prompts in chunks, decoding across the end of a block, drafts, and a window."""
    folder = make_checkpoint("qwen2", use_sliding_window=True, sliding_window=19, max_window_layers=1, tie_word_embeddings=True)
    for options in ({"max_prefill_chunk": 100}, {"speculative": "ngram", "adaptive_drafts": False}):
        assert generate(folder, attention_backend="flash_attn", **options) == generate(folder, **options)  # type: ignore[arg-type]


@dataclass
class Row:
    token_ids: list[int]
    blocks: list[int]
    adapter: int = 0


def test_a_step_of_one_token_each_is_one_that_a_graph_can_replay(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to a bucket, the library gets the same tensors at the same addresses in each step, and real rows what they get without."""
    config = EngineConfig(model="m", attention_backend="flash_attn", block_size=256, max_num_seqs=5, speculative="ngram")
    buckets, backend = Buckets.of(config), FlashAttnBackend(CPU, torch.float16)
    builder = BatchBuilder(64, 5, 1024, 256, CPU, buckets=buckets, copy=copy_later)
    asked: list[dict[str, Any]] = []
    called = flash_attn_standin.flash_attn_with_kvcache
    monkeypatch.setattr(backend, "_with_kvcache", lambda *args, **options: asked.append(options) or called(*args, **options))
    cache = make_cache(12, 2, 256, 64, torch.float16)
    wide, rows = LayerCache(cache.k.double(), cache.v.double()), [Row([1] * 900, [3 * n, 3 * n + 1, 3 * n + 2]) for n in range(3)]
    for starts in ([7, 254, 0], [8, 255, 1], [700, 256, 2]):
        batch = builder.build_one_each(rows, starts)
        assert batch.padded is not None and batch.padded.num_requests == 4
        q = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(starts[0])).half()
        got = backend.attention(q, cache, batch.padded, 0.1, window=270)[:3]
        expected = ReferenceBackend().attention(q[:3].double(), wide, batch, 0.1, 270)
        torch.testing.assert_close(got.double(), expected, rtol=2**-10, atol=2**-12)
    for name in ("cache_seqlens", "block_table"):
        assert len({(options[name].data_ptr(), options[name].shape, options[name].stride()) for options in asked}) == 1
    drafted = [RowSpan(row, 10, 2, 2, [5]) for row in rows]
    assert builder.build(drafted).padded is None, "rows of drafts run as they come"
    ops = SimpleNamespace(chosen={"linear[bf16]": "triton", "attention": "flash_attn", "embedding": "dequantised, triton"})
    assert can_capture_on_gpu(ops)  # type: ignore[arg-type]
    ops.chosen["rms_norm"] = "reference"
    assert not can_capture_on_gpu(ops)  # type: ignore[arg-type]


def test_settings_that_contradict_it() -> None:
    def config(**options: Any) -> EngineConfig:
        return EngineConfig(model="m", **{"attention_backend": "flash_attn", "block_size": 256, **options})

    config()
    config(kv_cache_dtype="bf16", dtype="bfloat16", block_size=1024)
    with pytest.raises(ConfigError, match="attention_backend must be one of auto, flash_attn, not 'fa2'"):
        config(attention_backend="fa2")
    with pytest.raises(ConfigError, match="block_size must be 256, 512 or 1024 for attention_backend flash_attn, not 16"):
        config(block_size=16)
    with pytest.raises(ConfigError, match="dtype must be float16 or bfloat16 for attention_backend flash_attn, not 'float32'"):
        config(dtype="float32")
    for kv in ("int8", "int4", "fp8", "fp8_e5m2", "fp32"):
        with pytest.raises(ConfigError, match=f"reads no quantised cache, not '{kv}'" if kv != "fp32" else "kv_cache_dtype must be auto"):
            config(kv_cache_dtype=kv)
    with pytest.raises(ConfigError, match="draft_top_k must be 1 for attention_backend flash_attn, which can't verify drafts that branch"):
        config(draft_top_k=2, speculative="draft", draft_model="d")


def test_devices_types_and_machines_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU from Ampere on, not device cpu; use --attention-backend auto"):
        select_ops(CPU, torch.bfloat16, attention="flash_attn")
    with pytest.raises(ConfigError, match=r"computes in float16 or bfloat16, not torch.float32; use --attention-backend auto"):
        select_ops(CPU, torch.float32, attention="flash_attn")
    cuda = torch.device("cuda")
    for capability, reason in (((7, 5), "compute capability 7.5"), ((8, 0), None), ((9, 0), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert flash_attn.unfit(cuda) == reason
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert flash_attn.unfit(cuda) == "an AMD one"
    monkeypatch.setattr(flash_attn, "unfit", lambda device: None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ConfigError, match="needs the flash_attn package: pip install flash-attn"):
        select_ops(CPU, torch.bfloat16, attention="flash_attn")


def test_models_and_caches_that_it_cannot_serve(installed: None, tiny_llama: Path) -> None:
    ops = select_ops(CPU, torch.float16, "reference", attention="flash_attn")
    ops.check_kv_cache("fp16", 80, 512)
    with pytest.raises(ConfigError, match="doesn't know kv_cache_dtype bf16; use fp16, or --attention-backend auto"):
        ops.check_kv_cache("bf16", 64, 256)
    with pytest.raises(ConfigError, match="reads blocks of 256, 512 or 1024 tokens, not 128: set --block-size"):
        ops.check_kv_cache("fp16", 64, 128)
    for dim in (100, 512):
        with pytest.raises(ConfigError, match=f"heads of up to 256 values, a multiple of 8, not {dim}; use --attention-backend auto"):
            ops.check_kv_cache("fp16", dim, 256)
    with pytest.raises(ConfigError, match="doesn't know kv_cache_dtype bf16"):
        LLM(str(tiny_llama), dtype="float16", kv_cache_dtype="bf16", block_size=256, attention_backend="flash_attn")
    batch, cache, q = make_batch([(1, 9)], 256, 1), make_cache(1, 1, 256, 8, torch.float16), torch.zeros(1, 2, 8).half()
    with pytest.raises(ConfigError, match="has no sinks, which this model's attention needs"):
        ops.attention(q, cache, batch, 1.0, sinks=torch.zeros(2))
    batch.tails = torch.full((1, 2), Batch.NO_TAIL)
    with pytest.raises(ConfigError, match="can't verify drafts that branch"):
        ops.attention(q, cache, batch, 1.0)
