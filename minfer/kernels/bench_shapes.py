"""What `minfer.kernels.bench` and `minfer.kernels.tune` measure with: the sizes of real models, kinds of matrices, and cases.

A case says how many bytes have to move at least once and how many operations have to be done; the rest of what a kernel does is its
own affair. Which cases an op has, `bench_cases.py`, `bench_moe.py` and `bench_tokens.py` say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from minfer.kernels.ops import Ops, Weight
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.elements import LISTED, Element

Call = Callable[[], Any]


@dataclass(frozen=True)
class Mixture:
    """experts in a layer, of which a token meets top_k."""

    experts: int
    top_k: int


@dataclass(frozen=True)
class Shape:
    """inner: of the feed-forward block, or of each expert."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    mixture: Mixture | None = None


SHAPES = {
    "smollm2-135m": Shape(576, 9, 3, 64, 1536, 49152),
    "qwen2.5-0.5b": Shape(896, 14, 2, 64, 4864, 151936),
    "llama3.2-1b": Shape(2048, 32, 8, 64, 8192, 128256),
    "llama2-7b": Shape(4096, 32, 32, 128, 11008, 32000),
    "llama3.1-8b": Shape(4096, 32, 8, 128, 14336, 128256),
    "qwen3-30b-a3b": Shape(2048, 32, 4, 128, 768, 151936, Mixture(128, 8)),
    "mixtral-8x7b": Shape(4096, 32, 8, 128, 14336, 32000, Mixture(8, 2)),
}


@dataclass(frozen=True)
class Case:
    """One op at one size. `make` builds a call on fresh operands for a table; `library` one of torch's own kernels for the same work."""

    op: str
    name: str
    bytes: int  # that have to move at least once
    operations: int
    unit: str  # whose peak bounds the operations: float32, bfloat16, float16, int8 or fp8
    make: Callable[[Ops], Call | None]  # None: the table has no kernel of its own for it
    library: Callable[[], Call] | None = None
    memory: int = 0  # bytes that the operands of a call take; 0: as many as move
    common: int = 0  # bytes of operands that all calls of a table share


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


def matrices_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """[N, K] of the products of a layer, stacked as the layers stack them; without those of experts."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = {"qkv": (q + 2 * kv, shape.hidden), "o": (shape.hidden, q)}
    return attention if shape.mixture else attention | feed_forward_of(shape)


def feed_forward_of(shape: Shape) -> dict[str, tuple[int, int]]:
    """[N, K] of the feed-forward block's products, or of each expert's."""
    return {"gate_up": (2 * shape.inner, shape.hidden), "down": (shape.hidden, shape.inner)}


@dataclass(frozen=True)
class Kind:
    """width: bytes a weight and its part of scales and minima as kernels keep them (0: the type's own). group 0: whole rows."""

    width: float
    element: Element | None
    group: int = 0
    activation: Literal["none", "int8", "fp8"] = "none"

    def bytes(self, weights: int, sizes: Sizes) -> int:
        return int(weights * (self.width or sizes.dtype.itemsize))

    def unit(self, sizes: Sizes) -> str:
        """What multiplies: the `unit` of a `Case`."""
        if self.activation == "int8" or (sizes.rounds_inputs and self.element in ("int8", "int4")):
            return "int8"
        return "fp8" if self.activation == "fp8" else sizes.unit


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


def prepared(ops: Ops, original: torch.Tensor | PackedWeight) -> Weight | None:
    """None where the table has no kernel for it: what it is dequantised to would be the dense matrix under another name."""
    weight = ops.prepare(original)
    if isinstance(original, PackedWeight) and ops.chosen[f"linear[{original.scheme.name}]"].startswith("dequantised"):
        return None
    return weight
