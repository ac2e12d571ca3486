"""Reads a Hugging Face folder: `config.json` beside one or many `.safetensors` files (https://github.com/huggingface/safetensors).

The files are memory-mapped by the safetensors package and opened again for every tensor. That is on purpose: a mapping lives
as long as a tensor taken from it, so a consumer that copies never has more of the file resident than the tensor at hand, and
one that keeps the tensor keeps the file's own pages instead of a copy.

Matrices that a tool has quantised come out as `PackedWeight` or dequantised, see quantized.py.

Left out: pickled weights (`.bin`, `.pt`), which can run code when read; Mistral's `consolidated.safetensors` (the same weights
under Meta's names and row order).
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minfer.errors import ModelLoadError
from minfer.loader.check import EMBEDDING, HEAD, check_tensors
from minfer.loader.checkpoint import Checkpoint, ModelSource, TensorInfo
from minfer.loader.hf_config import build_config, folder_config, read_json
from minfer.loader.quantized import Folded, QuantizedMatrix, find_reader, fold, names_of
from minfer.model_config import ModelConfig
from minfer.quant import PackedWeight
from minfer.quant.readers import MatrixReader

# Element types a plain (unquantised) weight may have: safetensors' name -> (bytes, the name config.json uses).
FLOAT_TYPES = {"F64": (8, "float64"), "F32": (4, "float32"), "F16": (2, "float16"), "BF16": (2, "bfloat16")}
# Those that the parts of a quantised matrix may have besides, and their bytes.
PART_TYPES = {"I8": 1, "U8": 1, "I16": 2, "I32": 4, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint(Checkpoint):
    format = "safetensors"

    def __init__(self, source: ModelSource) -> None:
        folder = _folder(source)
        raw, generation = folder_config(folder)
        reader = find_reader(folder, raw)
        found: dict[str, TensorInfo] = {}
        for file in _weight_files(folder):
            for name, info in _read_infos(file, quantised=reader is not None):
                if name in found:
                    raise ModelLoadError(f"{file}: tensor {name!r} is in {found[name].file} already; remove the stale file")
                found[name] = info
        if raw.get("dtype") is None and raw.get("torch_dtype") is None:
            raw["dtype"] = _commonest_dtype(found)
        config = build_config(raw, folder / "config.json", generation)
        self._reader = reader
        self._matrices: Mapping[str, QuantizedMatrix] = {}
        if reader is not None:
            folded = _fold(reader, found, config)
            found, self._matrices = folded.infos, folded.matrices
        if config.tie_word_embeddings and HEAD in found and not self._same_head(found):
            # The flag says tied but the file brings a head of its own: the weights are what was trained.
            config = dataclasses.replace(config, tie_word_embeddings=False)
        quantization = reader.label if reader is not None and self._matrices else None
        super().__init__(source, config, check_tensors(config, found, folder), tokenizer_source=folder, quantization=quantization)

    def read(self, name: str) -> torch.Tensor:
        matrix = self._matrices.get(name)
        return _read_tensor(self.tensor_infos[name].file, name) if matrix is None else matrix.read(_read_tensor).dequantize()

    def read_packed(self, name: str) -> PackedWeight | None:
        matrix = self._matrices.get(name)
        packed = None if matrix is None else matrix.read(_read_tensor)
        return packed if packed is not None and _some_kernel_takes(packed) else None

    def known_as(self) -> frozenset[str]:
        if self._reader is None or not self._matrices:
            return frozenset()
        smallest = min(self._matrices, key=lambda name: self.tensor_infos[name].num_bytes)
        return names_of(self._reader, self._matrices[smallest].scheme(_read_tensor))

    def tensors(self, *, keep_packed: bool = False) -> Iterator[tuple[str, torch.Tensor | PackedWeight]]:
        for name in self.tensor_infos:
            matrix = self._matrices.get(name)
            if matrix is None:
                yield name, self.read(name)
                continue
            packed = matrix.read(_read_tensor)  # once, whichever form it leaves in
            yield name, packed if keep_packed and _some_kernel_takes(packed) else packed.dequantize()

    def _same_head(self, found: Mapping[str, TensorInfo]) -> bool:
        return not {HEAD, EMBEDDING} & self._matrices.keys() and _same_data(found)


def _some_kernel_takes(packed: PackedWeight) -> bool:
    """Not groups of one input, as act-order leaves where groups are uneven: the scales alone outweigh the dense matrix."""
    return packed.scheme.group_size > 1


def _folder(source: ModelSource) -> Path:
    if source.path is None:
        raise ModelLoadError(f"{source.name}: no folder to read safetensors from")
    return source.path


def _weight_files(folder: Path) -> list[Path]:
    """One `model.safetensors`, or the shards that the index lists, or failing that every `model*.safetensors`."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    files = sorted(folder.glob("model*.safetensors")) or sorted(
        f for f in folder.glob("*.safetensors") if not f.name.startswith("consolidated")
    )
    if files:
        return files
    if list(folder.glob("consolidated*.safetensors")):
        raise ModelLoadError(f"{folder} has only consolidated.safetensors, Mistral's own layout; get the files named model*.safetensors")
    pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in folder.glob(pattern))
    if pickled:
        raise ModelLoadError(f"{folder} has only pickled weights ({pickled[0]}), which minfer never loads; convert them to safetensors")
    raise ModelLoadError(f"{folder} has no .safetensors file")


def _indexed_files(folder: Path) -> list[Path]:
    """The shards of the index. A shard's name must be a plain file name: an index must not reach outside its folder."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{folder / INDEX} has no 'weight_map'")
    names = set(weight_map.values()) if all(isinstance(v, str) for v in weight_map.values()) else {""}
    for name in names:
        if not name.endswith(".safetensors") or "/" in name or "\\" in name or "\0" in name:
            raise ModelLoadError(f"{folder / INDEX} names a shard {name!r}, which is not the name of a .safetensors file in this folder")
    files = [folder / name for name in sorted(names)]
    for file in files:
        if not file.is_file():
            raise ModelLoadError(f"{file} is missing, though {INDEX} lists it; the download is incomplete")
    return files


def _fold(reader: MatrixReader, found: Mapping[str, TensorInfo], config: ModelConfig) -> Folded:
    """A tied model may still bring a quantised head. What is left after folding must be plain."""
    head = (HEAD, (config.vocab_size, config.hidden_size))
    folded = fold(reader, found, (*config.tensor_shapes(), head), lambda name: not bool(_read_tensor(found[name].file, name).any()))
    for name, info in folded.infos.items():
        if name not in folded.matrices and info.dtype not in FLOAT_TYPES:
            raise ModelLoadError(f"{info.file}: tensor {name!r} {list(info.shape)} of {info.dtype} is no part of a {reader.label} matrix")
    return folded


def _read_infos(file: Path, *, quantised: bool) -> Iterator[tuple[str, TensorInfo]]:
    """Name, shape and type of each tensor, in the order in which they lie in the file."""
    types = {**{name: size for name, (size, _) in FLOAT_TYPES.items()}, **(PART_TYPES if quantised else {})}
    try:
        with safe_open(file, framework="pt") as f:
            for name in f.offset_keys():
                part = f.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                if dtype not in types:
                    raise ModelLoadError(f"{file}: tensor {name!r} is of type {dtype}; expected a weight in {', '.join(types)}")
                yield name, TensorInfo(shape, dtype, math.prod(shape) * types[dtype], file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(_explain(file, error)) from error


def _read_tensor(file: Path | None, name: str) -> torch.Tensor:
    try:
        with safe_open(file, framework="pt") as f:
            tensor: torch.Tensor = f.get_tensor(name)
            return tensor
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelLoadError(f"{file}: tensor {name!r} can't be read any more ({error}); did the file change?") from error


def _explain(file: Path, error: Exception) -> str:
    """The package says only that a file is incomplete; this names the first tensor that is cut off."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(min(length, size)))
        data = {n: t["data_offsets"] for n, t in header.items() if n != "__metadata__"}
        cut = [(begin, name, end) for name, (begin, end) in data.items() if 8 + length + end > size]
        if cut:
            _, name, end = min(cut)
            return f"{file} is truncated in tensor {name!r}: it has {size} bytes, expected at least {8 + length + end}; download it again"
    except (OSError, struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # the header itself is what is wrong, so the package's own words are the best there are
    return f"{file} is not a sound safetensors file: {error}"


def _commonest_dtype(found: Mapping[str, TensorInfo]) -> str:
    totals: dict[str, int] = {}
    for info in found.values():
        if info.dtype in FLOAT_TYPES:
            totals[info.dtype] = totals.get(info.dtype, 0) + info.num_bytes
    return FLOAT_TYPES[max(totals, key=lambda d: totals[d])][1] if totals else "bfloat16"


def _same_data(found: Mapping[str, TensorInfo]) -> bool:
    """Whether the head is a copy of the embedding, which some exporters write beside `tie_word_embeddings: true`."""
    if EMBEDDING not in found or found[EMBEDDING].shape != found[HEAD].shape:
        return False
    return torch.equal(_read_tensor(found[EMBEDDING].file, EMBEDDING), _read_tensor(found[HEAD].file, HEAD))
