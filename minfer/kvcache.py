"""The bytes of the KV cache: one K and one V tensor per layer, cut into blocks, with a scale per token and head where quantised.

    layer.k, layer.v              [num_blocks, kv_heads, block_size, width]   stored elements
    layer.k_scale, layer.v_scale  [num_blocks, kv_heads, block_size]          bfloat16, or None where K and V are stored as they are

A *block* holds `block_size` consecutive tokens of one sequence; a *slot* is block x block_size + offset. Heads come before
tokens, so that what one head reads of a block is contiguous. Which block belongs to whom is the scheduler's business
(`scheduler/block_pool.py`, plain integers); this file never learns about requests.

The type of the stored elements names the format (`KVFormat`): a float type stores the numbers, an 8-bit type codes, and uint8
two 4-bit codes in a byte, so that width is head_dim / 2. A row of head_dim numbers is quantised by itself:

    k[d] = scale * code[d]      int8
    k = H (scale * code)        fp8 and int4: H is the Walsh-Hadamard matrix over sqrt(n), its own inverse

with one scale, so a kernel folds it into the score after q . code, and into the probability before p . code. What a token's
row is depends on that token alone: a prompt cut into other chunks, or found in the prefix cache, has the same bytes. That
rules out scales per channel (KIVI, Liu 2024), which need to see many tokens; rotating with H (QuaRot, Ashkboos 2024) spreads
the outlying channels that they are for, and what is rotated needs no undoing in K when q is rotated too. int8's step is so fine
that it needs neither.

Between two powers of two an 8-bit float's steps are equal, so it is twice as exact below a power than above. Which of a
row's numbers fall where depends on the scale: fp8 tries eight, and keeps the one with the smallest squared error.

The memory is taken from the system once and never initialised: a slot is always written before it is read, and untouched
pages cost no resident memory on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minfer.errors import ConfigError
from minfer.model_config import ModelConfig

SCALE_DTYPE = torch.bfloat16  # float32's range, so that no row is too large or too small for its scale


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How the numbers of a row are stored. `limit` is the largest magnitude of a code; without one there is no scale.

    Packed codes lie in -8..7 and are stored plus 8: byte i holds channel i in its low half and channel i + head_dim / 2 in its
    high half. Their scale has the sign that maps the outermost number to -8, so that all 16 codes are used.
    """

    name: str  # as `kv_cache_dtype` spells it
    dtype: torch.dtype
    limit: float | None = None
    packed: bool = False  # two codes in one element
    rotated: bool = False
    searched: bool = False  # the scale is the best of several

    @property
    def scaled(self) -> bool:
        return self.limit is not None

    def width(self, head_dim: int) -> int:
        """Stored elements in a row of head_dim numbers."""
        if not self.packed:
            return head_dim
        if head_dim % 2:
            raise ConfigError(f"kv_cache_dtype {self.name} packs two numbers in a byte, so head_dim must be even, not {head_dim}; use int8")
        return head_dim // 2

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of one token's K (or V) of one head, its scale included."""
        return self.width(head_dim) * self.dtype.itemsize + (SCALE_DTYPE.itemsize if self.scaled else 0)


FORMATS = {
    format.name: format
    for format in (
        KVFormat("fp32", torch.float32),
        KVFormat("bf16", torch.bfloat16),
        KVFormat("fp16", torch.float16),
        KVFormat("fp8", torch.float8_e4m3fn, limit=448.0, rotated=True, searched=True),
        KVFormat("fp8_e5m2", torch.float8_e5m2, limit=57344.0, rotated=True, searched=True),
        KVFormat("int8", torch.int8, limit=127.0),
        KVFormat("int4", torch.uint8, limit=8.0, packed=True, rotated=True),
    )
}
_BY_DTYPE = {format.dtype: format for format in FORMATS.values()}


def format_of(dtype: torch.dtype) -> KVFormat:
    """The format whose elements have this type. Raises ConfigError."""
    if dtype not in _BY_DTYPE:
        raise ConfigError(f"the KV cache can't be stored as {dtype}; it takes {', '.join(FORMATS)}")
    return _BY_DTYPE[dtype]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """K and V of one layer, [num_blocks, kv_heads, block_size, width] each, and their scales where the format has them."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @staticmethod
    def empty(
        num_blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> LayerCache:
        """Memory for this many blocks, stored as `dtype`, uninitialised."""
        kind = format_of(dtype)
        shape = (num_blocks, kv_heads, block_size)
        k, v = (torch.empty((*shape, kind.width(head_dim)), dtype=dtype, device=device) for _ in range(2))
        if not kind.scaled:
            return LayerCache(k, v)
        return LayerCache(k, v, *(torch.empty(shape, dtype=SCALE_DTYPE, device=device) for _ in range(2)))

    @property
    def block_size(self) -> int:
        return self.k.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def format(self) -> KVFormat:
        return format_of(self.k.dtype)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Everything that belongs to a block, with the blocks first."""
        return [tensor for tensor in (self.k, self.v, self.k_scale, self.v_scale) if tensor is not None]


class KVCache:
    """All layers' blocks, stored as `dtype`. `block_bytes` is what one block costs over all layers, K, V and scales together."""

    def __init__(self, model: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.layers = [
            LayerCache.empty(num_blocks, model.num_kv_heads, block_size, model.head_dim, dtype, device) for _ in range(model.num_layers)
        ]

    @staticmethod
    def token_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that one token adds over all layers, its scales included."""
        return 2 * model.num_layers * model.num_kv_heads * format_of(dtype).row_bytes(model.head_dim)

    @staticmethod
    def block_bytes(model: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        return KVCache.token_bytes(model, dtype) * block_size

    def with_layers(self, keep: Sequence[int]) -> KVCache:
        """The same memory, of these layers only."""
        view = copy.copy(self)
        view.layers = [self.layers[number] for number in keep]
        return view

    def move_slots(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copies what single slots hold (source, destination); all are read before any is written."""
        sources, destinations = (torch.tensor(side) for side in zip(*moves, strict=True))
        size = self.block_size
        for layer in self.layers:
            for tensor in layer.tensors:
                raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor  # torch doesn't index 8-bit floats
                raw[destinations // size, :, destinations % size] = raw[sources // size, :, sources % size]

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole blocks (source, destination): the write half of copy-on-write."""
        if not copies:
            return
        sources, destinations = (list(side) for side in zip(*copies, strict=True))
        for layer in self.layers:
            for tensor in layer.tensors:
                raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor  # torch doesn't index 8-bit floats
                raw[destinations] = raw[sources]
