"""Parses a GGUF file's header: metadata and tensor table (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The `gguf` package has a reader; this one exists because a file may come from anywhere. Every count and length is held
against the bytes that are left before anything is allocated or looped over, so a header that lies costs an error and
not the machine's memory. It is also some twenty times faster, as it makes no numpy array per string of the vocabulary. What the
tensor types are and how large their blocks are, and dequantisation itself, is still the package's word.

Left out: big-endian files, version 1 and nested arrays, none of which current tools write for models.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minfer.errors import ModelLoadError

STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
# Far above any real model (the largest vocabularies have 300 thousand tokens, the largest models 3 thousand tensors), and
# low enough that a hostile file's Python objects fit in memory.
MAX_ARRAY, MAX_KEYS, MAX_TENSORS, MAX_DIMS = 2**22, 2**16, 2**18, 4


@dataclass(frozen=True)
class GGUFTensor:
    """A row of the tensor table. `shape` is rows first, the reverse of the file's order; `offset` counts from the file's start."""

    file: Path
    shape: tuple[int, ...]
    type_id: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(path: Path) -> GGUFHeader:
    """Metadata as Python values (arrays as lists) and the tensors by GGUF name; `ModelLoadError` if anything is out of bounds."""
    try:
        with path.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).parse()
    except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
        raise ModelLoadError(f"{path} can't be read as GGUF: {error}") from error


class _Parser:
    """A cursor over the mapped file that refuses to step past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position, self.size = path, data, 0, len(data)

    def parse(self) -> GGUFHeader:
        if self.size < 24 or self.data[:4] != b"GGUF":
            raise self.error("it does not start with a GGUF header; is it another kind of file, or an unfinished download?")
        self.position = 4
        version = self.number("<I", "version")
        if version & 0xFFFF == 0:
            raise self.error("it is big-endian, which is not supported; convert the model again on a little-endian machine")
        if version not in (2, 3):
            raise self.error(f"it is of GGUF version {version}; versions 2 and 3 are supported, so convert the model again")
        num_tensors = self.count("<Q", "number of tensors", MAX_TENSORS, item_bytes=24)
        num_keys = self.count("<Q", "number of metadata keys", MAX_KEYS, item_bytes=13)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string("metadata key")
            if key in metadata:
                raise self.error(f"metadata key {key!r} appears twice")
            metadata[key] = self.value(self.number("<I", key), key)
        return GGUFHeader(metadata, self.tensor_table(num_tensors, self.alignment(metadata)))

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if not isinstance(value, int) or not 8 <= value <= 2**20 or value & (value - 1):
            raise self.error(f"general.alignment is {value!r}, not a power of two from 8")
        return value

    def tensor_table(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        sizes = block_sizes()
        rows = []
        for _ in range(count):
            name = self.string("tensor name")
            num_dims = self.number("<I", name)
            if not 1 <= num_dims <= MAX_DIMS:
                raise self.error(f"tensor {name!r} has {num_dims} dimensions, expected 1 to {MAX_DIMS}")
            shape = tuple(self.number("<Q", name) for _ in range(num_dims))[::-1]
            rows.append((name, shape, self.number("<I", name), self.number("<Q", name)))
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_id, offset in rows:
            if name in tensors:
                raise self.error(f"tensor {name!r} appears twice")
            if type_id not in sizes:
                raise self.error(f"tensor {name!r} is of type {type_id}, unknown to the installed gguf package; a newer one may know it")
            if offset % alignment:
                raise self.error(f"tensor {name!r} starts at offset {offset}, which is not a multiple of the alignment {alignment}")
            block, block_bytes = sizes[type_id]
            if min(shape) < 1 or shape[-1] % block:
                raise self.error(f"tensor {name!r} has shape {list(shape)}, but its type comes in blocks of {block}")
            tensor = GGUFTensor(self.path, shape, type_id, start + offset, math.prod(shape) // block * block_bytes)
            if tensor.offset + tensor.num_bytes > self.size:
                raise self.error(
                    f"it is truncated in tensor {name!r}: it has {self.size} bytes, "
                    f"expected at least {tensor.offset + tensor.num_bytes}; download it again"
                )
            tensors[name] = tensor
        self.refuse_overlap(tensors)
        return tensors

    def refuse_overlap(self, tensors: dict[str, GGUFTensor]) -> None:
        end, last = 0, ""
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            if tensor.offset < end:
                raise self.error(f"tensors {last!r} and {name!r} overlap")
            end, last = tensor.offset + tensor.num_bytes, name

    def value(self, type_id: int, key: str) -> Any:
        if type_id == STRING:
            return self.string(key)
        if type_id != ARRAY:
            return self.number(self.scalar(type_id, key), key)
        type_id = self.number("<I", key)
        if type_id == STRING:
            return [self.string(key) for _ in range(self.count("<Q", f"length of {key}", MAX_ARRAY, item_bytes=8))]
        layout = self.scalar(type_id, key)
        count = self.count("<Q", f"length of {key}", MAX_ARRAY, item_bytes=struct.calcsize(layout))
        return list(struct.unpack_from(f"<{count}{layout[1]}", self.data, self.take(count * struct.calcsize(layout), key)))

    def scalar(self, type_id: int, key: str) -> str:
        if type_id not in SCALARS:
            what = "arrays of arrays are not supported" if type_id == ARRAY else f"value type {type_id} is unknown"
            raise self.error(f"metadata key {key!r}: {what}")
        return SCALARS[type_id]

    def take(self, num_bytes: int, what: str) -> int:
        begin = self.position
        if num_bytes > self.size - begin:
            raise self.error(f"the header ends within {what!r}; the file is truncated or damaged")
        self.position = begin + num_bytes
        return begin

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout), what))[0]

    def count(self, layout: str, what: str, limit: int, item_bytes: int) -> int:
        count: int = self.number(layout, what)
        if count > limit or count * item_bytes > self.size - self.position:
            raise self.error(f"the {what} is {count}, more than the file can hold")
        return count

    def string(self, what: str) -> str:
        length = self.number("<Q", what)
        begin = self.take(length, what)
        try:
            return self.data[begin : begin + length].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what!r} is not valid UTF-8") from error

    def error(self, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path} can't be used: {problem}")


def block_sizes() -> dict[int, tuple[int, int]]:
    """Tensor type id -> (elements of a block, bytes of a block), from the gguf package."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise ModelLoadError('reading GGUF files needs the gguf package; install it with: pip install "minfer[gguf]"') from error
    return {int(type_id): sizes for type_id, sizes in GGML_QUANT_SIZES.items()}
