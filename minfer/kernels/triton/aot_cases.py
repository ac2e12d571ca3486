"""The calls that `aot` compiles: each op at the shapes that serving gives it, on meta tensors, which have no memory.

Shapes are llama3.1-8b's (4096 wide, 32 query and 8 KV heads of 128) unless the name says otherwise; bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from minfer.batch import Batch
from minfer.kernels.ops import Weight
from minfer.kernels.triton import TritonBackend
from minfer.kvcache import LayerCache
from minfer.quant import PackedWeight, QuantScheme

ELEMENTS: tuple[Literal["int4", "int8"], ...] = ("int4", "int8")
META = torch.device("meta")
DTYPE = torch.bfloat16
BACKEND = TritonBackend(META, DTYPE, processors=132)


def meta(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _rotary() -> None:
    q, k, _ = meta(64, 48, 128).split((32, 8, 8), dim=1)
    BACKEND.rotary(q, k, meta(64, dtype=torch.int32), meta(8192, 128, dtype=torch.float32))


def _write_kv() -> None:
    _, k, v = meta(64, 48, 128).split((32, 8, 8), dim=1)
    BACKEND.write_kv(k, v, _cache(8, 128), meta(64, dtype=torch.int64))


def _cache(kv_heads: int, dim: int) -> LayerCache:
    return LayerCache(meta(1024, kv_heads, 16, dim), meta(1024, kv_heads, 16, dim))


def _attention(new: int, total: int, requests: int, heads: int = 32, kv_heads: int = 8, dim: int = 128, **masks: Any) -> Callable[[], None]:
    def call() -> None:
        start, lens, table = (meta(*shape, dtype=torch.int32) for shape in ((requests + 1,), (requests,), (requests, 64)))
        none = meta(0, dtype=torch.int32)
        batch = Batch(none, none, none, start, lens, table, none, [new] * requests, [total] * requests)
        q = meta(new * requests, heads + 2 * kv_heads, dim)[:, :heads]
        BACKEND.attention(q, _cache(kv_heads, dim), batch, dim**-0.5, **masks)

    return call


def _packed(n: int, k: int, element: Literal["int4", "int8"]) -> PackedWeight:
    """In groups of 128; int4 with minima, as AWQ has them, int8 without."""
    scales = meta(n, k // 128, dtype=torch.float32)
    mins = scales if element == "int4" else None
    return PackedWeight(meta(n, k, dtype=torch.int8), scales, mins, QuantScheme(element, 128, mins is None))


def _grouped(element: Literal["int4", "int8"], rows: int) -> Callable[[], None]:
    return lambda: linear(_packed(6144, 4096, element), rows)


def linear(matrix: torch.Tensor | PackedWeight, rows: int) -> None:
    weight = BACKEND.prepare(matrix, DTYPE)
    if not isinstance(weight, Weight):
        raise ValueError(weight)
    weight.linear(meta(rows, matrix.shape[1]), None)


CASES: dict[str, Callable[[], Any]] = {
    "rms_norm": lambda: BACKEND.rms_norm(meta(64, 4096), meta(4096), 1e-5, meta(64, 4096)),
    "rotary": _rotary,
    "write_kv": _write_kv,
    "act_mul": lambda: BACKEND.act_mul(meta(64, 2 * 14336), "silu"),
    "argmax": lambda: BACKEND.argmax(meta(64, 128256, dtype=torch.float32)),
    "embedding": lambda: BACKEND.prepare(meta(128256, 4096), DTYPE).embedding(meta(64, dtype=torch.int32)),  # type: ignore[union-attr]
    "attention, prompt": _attention(512, 512, 4),
    "attention, 64 sequences": _attention(1, 4096, 64),
    "attention, 1 sequence": _attention(1, 4096, 1),
    "attention, 64 sequences, 32 KV heads": _attention(1, 4096, 64, kv_heads=32),
    "attention, prompt, window": _attention(512, 8192, 4, window=4096),
    "attention, prompt, softcap, heads of 256": _attention(512, 512, 4, heads=16, dim=256, softcap=50.0),
    "attention, 64 sequences, smollm2": _attention(1, 1024, 64, heads=9, kv_heads=3, dim=64),
    "linear, bf16, 1 row": lambda: linear(meta(6144, 4096), 1),
    "linear, bf16, 4 rows": lambda: linear(meta(6144, 4096), 4),
    **{f"linear, {element}, {rows} row{'s' * (rows > 1)}": _grouped(element, rows) for element in ELEMENTS for rows in (1, 16, 64, 512)},
}
