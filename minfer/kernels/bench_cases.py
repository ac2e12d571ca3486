"""The ops of a layer as `minfer.kernels.bench` times them, at real models' sizes, and the library call to hold each against.

`rows` tokens are a decode step of as many sequences, or above the machine's largest decode batch one prompt. A mixture of experts in
place of the feed-forward block is `bench_moe.py`'s, what comes behind the last layer `bench_tokens.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from minfer.batch import Batch, LoraRows
from minfer.kernels.bench_moe import moe_cases
from minfer.kernels.bench_shapes import KINDS, Call, Case, Sizes, matrices_of, matrix, prepared
from minfer.kernels.bench_tokens import token_cases
from minfer.kernels.lora import SMALLEST_RANK, LoraPart, LoraWeights
from minfer.kernels.ops import Ops
from minfer.kvcache import LayerCache

BLOCK_SIZE = 16
ADAPTERS = 16


def cases(sizes: Sizes, rows: int) -> Iterator[Case]:
    shape, size = sizes.shape, sizes.dtype.itemsize
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield Case("rms_norm", "rms_norm", 4 * rows * h * size, 0, "float32", *_rms_norm(sizes, rows))
    yield Case("rotary_kv", "rotary_kv", 2 * rows * (q + 2 * kv) * size, 0, "float32", _rotary_kv(sizes, rows))
    yield _lora_case(sizes, rows)
    if shape.mixture is None:
        yield Case("act_mul", "act_mul", 3 * rows * shape.inner * size, 0, "float32", *_act_mul(sizes, rows))
    yield from token_cases(sizes, rows)
    for context in sizes.contexts if rows <= sizes.decode else (rows,):
        yield _attention_case(sizes, rows, context)
    yield from moe_cases(sizes, rows)
    for name, (n, k) in matrices_of(shape).items():
        for kind, scheme in KINDS.items():
            if k % (scheme.group or 1):
                continue
            moved, done = scheme.bytes(n * k, sizes) + rows * (n + k) * size, 2 * rows * n * k
            make, library = _linear(sizes, kind, n, k, rows)
            memory = max(moved, 3 * n * k)
            yield Case("linear", f"linear {kind} {name} [{n},{k}]", moved, done, scheme.unit(sizes), make, library, memory)


def _rms_norm(sizes: Sizes, rows: int) -> tuple[Callable[[Ops], Call], Callable[[], Call]]:
    def operands() -> tuple[torch.Tensor, ...]:
        h = sizes.shape.hidden
        return sizes.randn(rows, h), sizes.randn(rows, h), sizes.randn(h)

    def make(ops: Ops) -> Call:
        x, residual, weight = operands()
        return lambda: ops.rms_norm(x, weight, 1e-5, residual)

    def library() -> Call:
        x, residual, weight = operands()
        return lambda: F.rms_norm(x + residual, weight.shape, weight, 1e-5)

    return make, library


def _rotary_kv(sizes: Sizes, rows: int) -> Callable[[Ops], Call]:
    def make(ops: Ops) -> Call:
        shape = sizes.shape
        q, k, v = (sizes.randn(rows, heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
        positions = torch.arange(rows, dtype=torch.int32, device=sizes.device)
        table = torch.rand(rows, shape.head_dim, device=sizes.device)
        cache = LayerCache.empty(-(-rows // BLOCK_SIZE), shape.kv_heads, BLOCK_SIZE, shape.head_dim, sizes.dtype, sizes.device)
        slots = torch.randperm(rows, device=sizes.device)
        return lambda: ops.rotary_kv(q, k, v, positions, table, cache, slots)

    return make


def _act_mul(sizes: Sizes, rows: int) -> tuple[Callable[[Ops], Call], Callable[[], Call]]:
    def make(ops: Ops) -> Call:
        x = sizes.randn(rows, 2 * sizes.shape.inner)
        return lambda: ops.act_mul(x, "silu")

    def library() -> Call:
        gate, up = sizes.randn(rows, 2 * sizes.shape.inner).chunk(2, dim=-1)
        return lambda: F.silu(gate) * up

    return make, library


def _lora_case(sizes: Sizes, rows: int) -> Case:
    """On the qkv product; of `ADAPTERS` each row of a decode step has the next, a prompt has one."""
    shape, rank = sizes.shape, SMALLEST_RANK
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    outputs, k = (q, kv, kv), shape.hidden
    n, prompt = sum(outputs), rows > sizes.decode
    adapters = 1 if prompt else min(rows, ADAPTERS)

    def make(ops: Ops) -> Call:
        parts = [[LoraPart(sizes.randn(rank, k), sizes.randn(size, rank), 1.0) for size in outputs] for _ in range(adapters)]
        weights = ops.prepare_lora(LoraWeights.stack(parts, k, outputs, sizes.dtype, sizes.device))
        x, y, mine = sizes.randn(rows, k), sizes.randn(rows, n), lora_rows(rows, adapters, 64 if prompt else 16, sizes.device)
        return lambda: ops.lora(y, x, weights, mine)

    weights = rank * (len(outputs) * k + n)
    moved, name = (adapters * weights + rows * (k + 2 * n)) * sizes.dtype.itemsize, f"lora, {adapters} of rank {rank}, qkv [{n},{k}]"
    return Case("lora", name, moved, 2 * rows * weights, sizes.unit, make)


def lora_rows(rows: int, adapters: int, tile_rows: int, device: torch.device) -> LoraRows:
    """Row i has adapter i % adapters, in tiles as `runner/lora_rows.py` cuts them."""
    order: list[int] = []
    groups, tiles = [], []
    for number in range(1, adapters + 1):
        own = range(number - 1, rows, adapters)
        groups.append((number, len(order), len(own)))
        tiles += [(number, len(order) + at, min(tile_rows, len(own) - at)) for at in range(0, len(own), tile_rows)]
        order += own
    indices, cuts = (torch.tensor(values, dtype=torch.int32, device=device) for values in (order, tiles))
    return LoraRows(indices, cuts, groups, tile_rows)


def _attention_case(sizes: Sizes, rows: int, context: int) -> Case:
    shape = sizes.shape
    new, total, requests = (1, context, rows) if rows <= sizes.decode else (rows, rows, 1)
    seen = requests * (new * (total - new) + new * (new + 1) // 2)
    kv = 2 * requests * total * shape.kv_heads * shape.head_dim * sizes.dtype.itemsize
    operations = 4 * seen * shape.heads * shape.head_dim

    def make(ops: Ops) -> Call:
        q, cache, batch = _paged(sizes, new, total, requests)
        return lambda: ops.attention(q, cache, batch, shape.head_dim**-0.5)

    def library() -> Call:
        """K and V dense and in order, which a serving engine doesn't have."""
        q = sizes.randn(requests, shape.heads, new, shape.head_dim)
        k, v = (sizes.randn(requests, shape.kv_heads, total, shape.head_dim) for _ in range(2))
        grouped = shape.heads != shape.kv_heads
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=new > 1, enable_gqa=grouped)

    name = f"attention {requests}x{new} over {total}"
    return Case("attention", name, kv, operations, sizes.unit, make, library)


def _paged(sizes: Sizes, new: int, total: int, requests: int) -> tuple[torch.Tensor, LayerCache, Batch]:
    shape, device = sizes.shape, sizes.device
    width = -(-total // BLOCK_SIZE)
    blocks = torch.randperm(requests * width, device=device).int().view(requests, width)
    pages = (requests * width, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
    cache = LayerCache(*(torch.empty(pages, dtype=sizes.dtype, device=device).normal_() for _ in range(2)))
    start = torch.arange(requests + 1, dtype=torch.int32, device=device) * new
    none = torch.zeros(0, dtype=torch.int32, device=device)
    lens = torch.full((requests,), total, dtype=torch.int32, device=device)
    batch = Batch(none, none, none.long(), start, lens, blocks, none.long(), [new] * requests, [total] * requests)
    return sizes.randn(requests * new, shape.heads, shape.head_dim), cache, batch


def _linear(sizes: Sizes, kind: str, n: int, k: int, rows: int) -> tuple[Callable[[Ops], Call | None], Callable[[], Call]]:
    def make(ops: Ops) -> Call | None:
        x, weight = sizes.randn(rows, k), prepared(ops, matrix(kind, n, k, sizes))
        return None if weight is None else lambda: ops.linear(x, weight)

    def library() -> Call:
        """The dense product of the vendor's library, for quantised matrices too: that is what they have to beat."""
        weight, x = sizes.randn(n, k), sizes.randn(rows, k)
        return lambda: F.linear(x, weight)

    return make, library
