"""What `minfer.kernels.bench` times: every op at the sizes that real models give it, and the library call to hold it against.

A case says how many bytes have to move at least once and how many operations have to be done; the rest of what a kernel does is its
own affair. `rows` tokens are a decode step of as many sequences, or above the machine's largest decode batch one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from minfer.batch import Batch
from minfer.kernels.ops import Ops
from minfer.kvcache import LayerCache
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.elements import LISTED, Element

BLOCK_SIZE = 16
Call = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int


SHAPES = {
    "smollm2-135m": Shape(576, 9, 3, 64, 1536, 49152),
    "qwen2.5-0.5b": Shape(896, 14, 2, 64, 4864, 151936),
    "llama3.2-1b": Shape(2048, 32, 8, 64, 8192, 128256),
    "llama2-7b": Shape(4096, 32, 32, 128, 11008, 32000),
    "llama3.1-8b": Shape(4096, 32, 8, 128, 14336, 128256),
}


@dataclass(frozen=True)
class Case:
    """One op at one size. `make` builds a call on fresh operands for a table; `library` one of torch's own kernels for the same work."""

    op: str
    name: str
    bytes: int  # that have to move at least once
    operations: int
    unit: str  # whose peak bounds the operations: float32, bfloat16, float16 or int8
    make: Callable[[Ops], Call | None]  # None: the table has no kernel of its own for it
    library: Callable[[], Call] | None = None
    memory: int = 0  # bytes its operands take, where that is more than what moves


@dataclass(frozen=True)
class Sizes:
    """`decode`: the most rows that count as a decode step. `rounds_inputs`: whether products with integer codes are integer ones."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    contexts: Sequence[int]
    decode: int
    rounds_inputs: bool

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    @property
    def unit(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def cases(sizes: Sizes, rows: int) -> Iterator[Case]:
    shape, size = sizes.shape, sizes.dtype.itemsize
    h, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield Case("rms_norm", "rms_norm", 4 * rows * h * size, 0, "float32", *_rms_norm(sizes, rows))
    yield Case("rotary_kv", "rotary_kv", 2 * rows * (q + 2 * kv) * size, 0, "float32", _rotary_kv(sizes, rows))
    yield Case("act_mul", "act_mul", 3 * rows * shape.inner * size, 0, "float32", *_act_mul(sizes, rows))
    if rows <= sizes.decode:
        yield Case("argmax", "argmax", rows * shape.vocab * 4, 0, "float32", *_argmax(sizes, rows))
    for context in sizes.contexts if rows <= sizes.decode else (rows,):
        yield _attention_case(sizes, rows, context)
    for name, (n, k) in matrices_of(shape).items():
        for kind, scheme in KINDS.items():
            if k % (scheme.group or 1):
                continue
            moved = int(n * k * (scheme.width or size)) + rows * (n + k) * size
            integer = scheme.activation == "int8" or (sizes.rounds_inputs and scheme.element in ("int8", "int4"))
            unit = "int8" if integer else "fp8" if scheme.activation == "fp8" else sizes.unit
            make, library = _linear(sizes, kind, n, k, rows)
            yield Case("linear", f"linear {kind} {name} [{n},{k}]", moved, 2 * rows * n * k, unit, make, library, 3 * n * k)


def matrices_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """[N, K] of the products of a layer, stacked as the layers stack them."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "qkv": (q + 2 * kv, shape.hidden),
        "o": (shape.hidden, q),
        "gate_up": (2 * shape.inner, shape.hidden),
        "down": (shape.hidden, shape.inner),
    }


@dataclass(frozen=True)
class Kind:
    """width: bytes a weight and its part of scales and minima as kernels keep them (0: the type's own). group 0: whole rows."""

    width: float
    element: Element | None
    group: int = 0
    activation: Literal["none", "int8", "fp8"] = "none"


KINDS: dict[str, Kind] = {
    "dense": Kind(0.0, None),
    "int8": Kind(1.0625, "int8", 32),
    "int4": Kind(0.625, "int4", 32),
    "int4-128": Kind(0.53125, "int4", 128),
    "fp8": Kind(1.0, "fp8_e4m3"),
    "nf4": Kind(0.53125, "nf4", 64),
    "mxfp4": Kind(0.53125, "fp4_e2m1", 32),
    "int8 x int8": Kind(1.0, "int8", activation="int8"),
    "fp8 x fp8": Kind(1.0, "fp8_e4m3", activation="fp8"),
}


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


def _argmax(sizes: Sizes, rows: int) -> tuple[Callable[[Ops], Call], Callable[[], Call]]:
    def logits() -> torch.Tensor:
        return torch.randn(rows, sizes.shape.vocab, device=sizes.device)

    def make(ops: Ops) -> Call:
        x = logits()
        return lambda: ops.argmax(x)

    def library() -> Call:
        x = logits()
        return lambda: x.argmax(-1)

    return make, library


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
    return Case("attention", name, kv, operations, sizes.unit, make, library, kv)


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
        original, x = matrix(kind, n, k, sizes), sizes.randn(rows, k)
        weight = ops.prepare(original)
        if isinstance(original, PackedWeight) and ops.chosen[f"linear[{original.scheme.name}]"].startswith("dequantised"):
            return None  # it would be the dense product's time under another name
        return lambda: ops.linear(x, weight)

    def library() -> Call:
        """The dense product of the vendor's library, for quantised matrices too: that is what they have to beat."""
        weight, x = sizes.randn(n, k), sizes.randn(rows, k)
        return lambda: F.linear(x, weight)

    return make, library


def matrix(kind: str, n: int, k: int, sizes: Sizes) -> torch.Tensor | PackedWeight:
    """A random matrix; of `KINDS` those with an element are quantised, int4 with a zero point, as AWQ has it."""
    wanted = KINDS[kind]
    element, group = wanted.element, wanted.group
    if element is None:
        return sizes.randn(n, k)
    scheme = QuantScheme(element, group or k, element != "int4", wanted.activation, "e8m0" if kind == "mxfp4" else "float")
    low, high = {"int8": (-128, 128), "fp8_e4m3": (0, 127)}.get(element, (0, 16))
    codes = torch.randint(low, high, (n, k), device=sizes.device, dtype=torch.int8)
    scales = torch.rand(n, k // scheme.group_size, device=sizes.device).bfloat16().float()
    levels = torch.linspace(-1, 1, 16, device=sizes.device) if element in LISTED else None
    return PackedWeight(codes, scales, -8 * scales if element == "int4" else None, scheme, levels)
