"""The calls that `aot` compiles: each op at the shapes that serving gives it, on meta tensors, which have no memory.

Shapes are llama3.1-8b's (4096 wide, 32 query and 8 KV heads of 128) unless the name says otherwise; bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from minfer.batch import Batch, LoraRows
from minfer.kernels.lora import LoraWeights
from minfer.kernels.ops import Experts, Weight
from minfer.kernels.triton import TritonBackend
from minfer.kvcache import LayerCache
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.elements import LISTED, Element

META = torch.device("meta")
DTYPE = torch.bfloat16


Case = Callable[[TritonBackend], Any]


def meta(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _rotary_kv(dtype: torch.dtype, normed: bool = False) -> Case:
    def call(backend: TritonBackend) -> None:
        q, k, v = meta(64, 48, 128).split((32, 8, 8), dim=1)
        positions, table = meta(64, dtype=torch.int32), meta(8192, 128, dtype=torch.float32)
        norms = (meta(128), meta(128), 1e-6) if normed else None
        backend.rotary_kv(q, k, v, positions, table, _cache(8, 128, dtype), meta(64, dtype=torch.int64), norms)

    return call


QUANTISED_KV = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def _cache(kv_heads: int, dim: int, dtype: torch.dtype) -> LayerCache:
    return LayerCache.empty(1024, kv_heads, 16, dim, dtype, META)


def _attention(
    new: int, total: int, requests: int, heads: int = 32, kv_heads: int = 8, dim: int = 128, stored: torch.dtype = DTYPE,
    branches: bool = False, shared: int = 0, sinks: bool = False, **masks: Any,
) -> Case:  # fmt: skip
    def call(backend: TritonBackend) -> None:
        start, lens, table = (meta(*shape, dtype=torch.int32) for shape in ((requests + 1,), (requests,), (requests, 64)))
        none = meta(0, dtype=torch.int32)
        batch = Batch(none, none, none, start, lens, table, none, [new] * requests, [total] * requests)
        if branches:
            batch.tails = meta(requests, 9, dtype=torch.int64)
        if shared:
            batch.shared, batch.shared_host = meta(1, dtype=torch.int32), shared
        q = meta(new * requests, heads + 2 * kv_heads, dim)[:, :heads]
        scores = meta(heads, dtype=torch.float32) if sinks else None
        backend.attention(q, _cache(kv_heads, dim, stored), batch, dim**-0.5, sinks=scores, **masks)

    return call


def _linear(matrix: torch.Tensor | PackedWeight, rows: int) -> Case:
    def call(backend: TritonBackend) -> None:
        weight = backend.prepare(matrix, DTYPE)
        if not isinstance(weight, Weight):
            raise ValueError(weight)
        weight.linear(meta(rows, matrix.shape[1]), None)

    return call


def _lora(rank: int, tile_rows: int, tiles: int) -> Case:
    """16 adapters of the q, k and v projections."""

    def call(backend: TritonBackend) -> None:
        k, columns, rows = 4096, (0, 4096, 5120, 6144), tile_rows * tiles
        of_parts = (meta(16, 3, dtype=torch.float32), meta(16, 3, dtype=torch.int32), meta(4, dtype=torch.int32))
        weights = LoraWeights(meta(16, 3 * rank, k), meta(16, rank, columns[-1]), *of_parts, columns, rank)
        lora = LoraRows(meta(rows, dtype=torch.int32), meta(tiles, 3, dtype=torch.int32), [], tile_rows)
        backend.lora(meta(rows, columns[-1]), meta(rows, k), weights, lora)

    return call


def _moe(element: Element | None, tokens: int, activation: Literal["none", "fp8"] = "none") -> Case:
    """Qwen3-30B-A3B's: 8 of 128 experts of width 768 behind 2048; and as if it had a shared one. element None: bfloat16."""

    def call(backend: TritonBackend) -> None:
        sides: list[list[Weight]] = []
        for n, k in ((1536, 2048), (2048, 768)):
            weight = backend.prepare(meta(n, k) if element is None else _packed(element, 128, activation, n, k), DTYPE)
            if not isinstance(weight, Weight):
                raise ValueError(weight)
            sides.append([weight] * 128)
        experts = backend.experts(*sides)
        if not isinstance(experts, Experts):
            raise ValueError(experts)
        experts.moe(meta(tokens, 2048), meta(tokens, 128), 8, True, "silu", (meta(tokens, 2048), meta(tokens, 1)))

    return call


def _packed(
    element: Element, group: int, activation: Literal["none", "int8", "fp8"] = "none", n: int = 6144, k: int = 4096
) -> PackedWeight:
    """int4 with zero points, as AWQ has them; the others without."""
    scales = meta(n, k // group, dtype=torch.float32)
    mins = scales if element == "int4" else None
    levels = torch.linspace(-1, 1, 16) if element in LISTED else None
    return PackedWeight(meta(n, k, dtype=torch.int8), scales, mins, QuantScheme(element, group, mins is None, activation), levels)


def _products() -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, matrix, rows_of in (
        ("int4", _packed("int4", 128), (1, 16, 64, 256, 512)),
        ("int4 in 32s", _packed("int4", 32), (16,)),
        ("int8", _packed("int8", 128), (16,)),
        ("fp8", _packed("fp8_e4m3", 4096), (1, 256)),
        ("nf4", _packed("nf4", 64), (16,)),
        ("mxfp4", _packed("fp4_e2m1", 32), (16,)),
        ("int8 x int8", _packed("int8", 4096, "int8"), (16, 512)),
        ("fp8 x fp8", _packed("fp8_e4m3", 4096, "fp8"), (16, 512)),
        ("fp8 x fp8, blocks", _packed("fp8_e4m3", 128, "fp8"), (512,)),
    ):
        for rows in rows_of:
            cases[f"linear, {name}, {rows} row{'s' * (rows > 1)}"] = _linear(matrix, rows)
    return cases


def _rounded_norm(backend: TritonBackend) -> None:
    backend.prepare(_packed("int8", 4096, "int8"), DTYPE).rms_norm(meta(64, 4096), meta(4096), 1e-5, meta(64, 4096))  # type: ignore[union-attr]


def _rounded_activation(backend: TritonBackend) -> None:
    backend.prepare(_packed("int8", 128, "int8"), DTYPE).act_mul(meta(64, 2 * 14336), "silu")  # type: ignore[union-attr]


CASES: dict[str, Case] = {
    "rms_norm": lambda backend: backend.rms_norm(meta(64, 4096), meta(4096), 1e-5, meta(64, 4096)),
    "rotary_kv": _rotary_kv(DTYPE),
    "rotary_kv, heads normalised": _rotary_kv(DTYPE, normed=True),
    "rotary_kv, heads normalised, fp8": _rotary_kv(torch.float8_e4m3fn, normed=True),
    **{f"rotary_kv, {name}": _rotary_kv(dtype) for name, dtype in QUANTISED_KV.items()},
    "act_mul": lambda backend: backend.act_mul(meta(64, 2 * 14336), "silu"),
    "rms_norm, rounded to int8": _rounded_norm,
    "act_mul, rounded to int8 in 128s": _rounded_activation,
    "argmax": lambda backend: backend.argmax(meta(64, 128256, dtype=torch.float32)),
    "sample": lambda backend: backend.sample(
        meta(64, 128256, dtype=torch.float32), meta(64, 6, dtype=torch.float64), meta(64, dtype=torch.int32)
    ),
    "logprobs": lambda backend: backend.logprobs(meta(64, 128256, dtype=torch.float32), meta(64, dtype=torch.int64), 20),
    "forbid": lambda backend: backend.forbid(meta(64, 128256, dtype=torch.float32), meta(64, 4008, dtype=torch.int32)),
    "embedding": lambda backend: backend.prepare(meta(128256, 4096), DTYPE).embedding(meta(64, dtype=torch.int32)),  # type: ignore[union-attr]
    "attention, prompt": _attention(512, 512, 4),
    "attention, 64 sequences": _attention(1, 4096, 64),
    "attention, 1 sequence": _attention(1, 4096, 1),
    "attention, 64 sequences, 32 KV heads": _attention(1, 4096, 64, kv_heads=32),
    "attention, prompt, window": _attention(512, 8192, 4, window=4096),
    "attention, prompt, softcap, heads of 256": _attention(512, 512, 4, heads=16, dim=256, softcap=50.0),
    "attention, 64 sequences, smollm2": _attention(1, 1024, 64, heads=9, kv_heads=3, dim=64),
    "attention, 64 sequences, gpt-oss with sinks": _attention(1, 1024, 64, heads=64, kv_heads=8, dim=64, sinks=True),
    "attention, 64 rows, drafts that branch": _attention(1, 4096, 64, branches=True),
    "attention, 64 sequences, 4096 tokens shared": _attention(1, 4608, 64, shared=4096),
    **{f"attention, 64 sequences, {name} cache": _attention(1, 4096, 64, stored=dtype) for name, dtype in QUANTISED_KV.items()},
    **{f"attention, prompt, {name} cache": _attention(512, 512, 4, stored=QUANTISED_KV[name]) for name in ("int8", "fp8")},
    "attention, 8 x 5 of drafts": _attention(5, 16384, 8),
    "attention, 8 x 5 of drafts, others that branch": _attention(5, 16384, 8, branches=True),
    "attention, 8 x 5 of drafts, gpt-oss with sinks": _attention(5, 16384, 8, heads=64, kv_heads=8, dim=64, sinks=True),
    **{f"attention, 8 x 5 of drafts, {name} cache": _attention(5, 16384, 8, stored=QUANTISED_KV[name]) for name in ("int8", "int4", "fp8")},
    "attention, 64 new of 16384": _attention(64, 16384, 1),
    "lora, 16 adapters, rank 16": _lora(16, 16, 16),
    "lora, 16 adapters, rank 128": _lora(128, 16, 16),
    "lora, prompt, rank 16": _lora(16, 64, 32),
    "lora, prompt, rank 128": _lora(128, 64, 32),
    "linear, bf16, 1 row": _linear(meta(6144, 4096), 1),
    "linear, bf16, 4 rows": _linear(meta(6144, 4096), 4),
    **_products(),
    "moe, bf16, 64 tokens": _moe(None, 64),
    "moe, int4, 1 token": _moe("int4", 1),
    "moe, int4, 64 tokens": _moe("int4", 64),
    "moe, int4, 1024 tokens": _moe("int4", 1024),
    "moe, fp8 x fp8, 64 tokens": _moe("fp8_e4m3", 64, "fp8"),
}
