"""Reads GGUF files, llama.cpp's single-file format: config, tokenizer data and weights, split files included.

Weights come out under Hugging Face's names. Quantised matrices are dequantised by the `gguf` package to fp32, some rows at a time, so
that no second whole copy exists; F32, F16 and BF16 tensors are pages of the mapped file. Each tensor has a mapping of its own,
which goes when the tensor does.

Files of architecture "llama" hold q and k with the two halves of each head interleaved (Meta's rotary order); models here
rotate halves (Hugging Face's order), so those rows are put back. It is done on packed rows: blocks run along a row, so whole rows
may move. A few Mistral files converted from Mistral's native format aren't interleaved, and nothing in them says so; they
come out as nonsense in every engine that goes by the architecture.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from minfer.errors import ModelLoadError
from minfer.loader.check import check_tensors
from minfer.loader.checkpoint import Checkpoint, ModelSource, TensorInfo
from minfer.loader.gguf_config import hf_config, hf_name
from minfer.loader.gguf_header import GGUFHeader, GGUFTensor, block_sizes, read_header
from minfer.loader.hf_config import build_config
from minfer.model_config import MAX_EXPERTS, ModelConfig
from minfer.quant import PackedWeight
from minfer.quant.gguf import unpack_gguf

logger = logging.getLogger("minfer.load")
FREQ_FACTORS = "rope_freqs.weight"
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK_ELEMENTS = 2**20  # dequantised at once: small beside a matrix, large beside the per-call cost of numpy
SPLIT = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf")


class GGUFCheckpoint(Checkpoint):
    format = "gguf"

    def __init__(self, source: ModelSource) -> None:
        if source.path is None:
            raise ModelLoadError(f"{source.name}: no file to read GGUF from")
        header = _read_parts(source.path)
        types = _type_names(header, source.path)
        config = _config(header, types, source.path)
        self._interleaved = header.metadata["general.architecture"] == "llama"
        self._main_type = _main_type(header, types)
        self._dequantized: set[str] = set()  # types that this was said of
        self._tensors = _by_hf_name(header)
        found = {name: TensorInfo(t.shape, types[t.type_id], t.num_bytes, t.file) for name, t in self._tensors.items()}
        super().__init__(
            source,
            config,
            check_tensors(config, found, source.path),
            tokenizer_source=header.metadata if "tokenizer.ggml.tokens" in header.metadata else None,
            quantization=_quantization(header, types),
        )

    def read(self, name: str) -> torch.Tensor:
        dtype, tensor = self.tensor_infos[name].dtype, self._tensors[name]
        order = self._row_order(name, tensor)
        return _plain(tensor, PLAIN[dtype], order) if dtype in PLAIN else _dequantize(tensor, order)

    def read_packed(self, name: str) -> PackedWeight | None:
        dtype, tensor = self.tensor_infos[name].dtype, self._tensors[name]
        if len(tensor.shape) != 2 or dtype in PLAIN:
            return None
        packed = unpack_gguf(dtype, _map(tensor, tensor.shape[0]))
        if packed is None and dtype not in self._dequantized:
            self._dequantized.add(dtype)
            bits = 8 * tensor.num_bytes / math.prod(tensor.shape)
            logger.warning("no kernel runs %s: such matrices are dequantised, to 16 bits a weight or more instead of %.3g", dtype, bits)
        order = self._row_order(name, tensor)
        return packed if packed is None or order is None else packed.rows(torch.from_numpy(order))

    def known_as(self) -> frozenset[str]:
        """What most of its weights are: Q4_K is int4, Q8_0 is int8; types with a table of their own are neither."""
        return frozenset({"Q4": {"int4"}, "Q8": {"int8"}, "MX": {"mxfp4"}}.get(self._main_type[:2], set()))

    def _row_order(self, name: str, tensor: GGUFTensor) -> npt.NDArray[np.int64] | None:
        """Row r of the result is row order[r] of the file; None where the file's order is already the model's."""
        if not self._interleaved or not re.search(r"\.self_attn\.[qk]_proj\.", name):
            return None
        heads = self.config.num_heads if ".q_proj." in name else self.config.num_kv_heads
        rows = np.arange(tensor.shape[0])  # of a head: first, second, first, second, ... half
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _by_hf_name(header: GGUFHeader) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    arch = header.metadata["general.architecture"]
    for name, tensor in header.tensors.items():
        new_name = hf_name(name, arch)
        if new_name is not None and "{}" in new_name:
            tensors |= {new_name.format(expert): part for expert, part in enumerate(_of_each_expert(name, tensor))}
        elif new_name is not None:
            # The gate of a shared expert is a matrix of one row to everybody else.
            one_row = new_name.endswith("shared_expert_gate.weight") and len(tensor.shape) == 1
            tensors[new_name] = dataclasses.replace(tensor, shape=(1, *tensor.shape)) if one_row else tensor
        elif name != FREQ_FACTORS:
            raise ModelLoadError(
                f"{tensor.file}: tensor {name!r} {list(tensor.shape)} has no place in a {arch} model; that variant is not supported"
            )
    return tensors


def _of_each_expert(name: str, tensor: GGUFTensor) -> list[GGUFTensor]:
    """A tensor [E, N, K] as E matrices, which lie one behind the other."""
    if len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS:
        raise ModelLoadError(
            f"{tensor.file}: tensor {name!r} {list(tensor.shape)} must hold a matrix for each of up to {MAX_EXPERTS} experts: [E, N, K]"
        )
    size = tensor.num_bytes // tensor.shape[0]
    return [
        dataclasses.replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * size, num_bytes=size)
        for expert in range(tensor.shape[0])
    ]


def split_parts(path: Path) -> list[Path]:
    """All files of a split model, given its first; just the file when its name is not that of a part."""
    match = SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    total = int(match[3])
    if int(match[2]) != 1:
        raise ModelLoadError(
            f"{path} is part {int(match[2])} of {total} of a split model; give the first part, {match[1]}-00001-of-{match[3]}.gguf"
        )
    if total > 1000:
        raise ModelLoadError(f"{path} claims to be one of {total} parts")
    return [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in range(1, total + 1)]


def _read_parts(path: Path) -> GGUFHeader:
    parts = split_parts(path)
    for part in parts:
        if not part.is_file():
            raise ModelLoadError(f"{part} is missing" + (f"; the model is split into {len(parts)} files" if len(parts) > 1 else ""))
    first = read_header(parts[0])
    count = first.metadata.get("split.count", 1)
    if count not in (len(parts), 0):
        raise ModelLoadError(
            f"{path} says that it is split into {count} files; keep their original names, which end in -00001-of-0000N.gguf"
        )
    tensors = dict(first.tensors)
    for part in parts[1:]:
        for name, tensor in read_header(part).tensors.items():
            if name in tensors:
                raise ModelLoadError(f"{part}: tensor {name!r} is in {tensors[name].file} already")
            tensors[name] = tensor
    return GGUFHeader(first.metadata, tensors)


def _type_names(header: GGUFHeader, path: Path) -> dict[int, str]:
    """Names of the types in use, each one tried on a block of zeros: only the package knows what it can dequantise."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    names = {}
    for name, tensor in header.tensors.items():
        kind = GGMLQuantizationType(tensor.type_id)
        if tensor.type_id not in names and kind.name not in PLAIN:
            try:
                dequantize(np.zeros((1, block_sizes()[tensor.type_id][1]), np.uint8), kind)
            except NotImplementedError as error:
                raise ModelLoadError(f"{path}: tensor {name!r} is of type {kind.name}, which the gguf package can't dequantise") from error
        names[tensor.type_id] = kind.name
    return names


def _config(header: GGUFHeader, types: Mapping[int, str], path: Path) -> ModelConfig:
    embedding = header.tensors.get("token_embd.weight")
    try:
        raw = hf_config(header.metadata, header.tensors.keys(), embedding.shape[0] if embedding else 0)
    except ModelLoadError as error:
        raise ModelLoadError(f"{path}: {error}") from error
    factors = header.tensors.get(FREQ_FACTORS)
    if factors is not None:
        if types[factors.type_id] != "F32" or factors.shape != (raw["head_dim"] // 2,):
            raise ModelLoadError(f"{path}: tensor {FREQ_FACTORS!r} must be F32 [{raw['head_dim'] // 2}], not {list(factors.shape)}")
        raw["rope_freq_factors"] = _plain(factors, torch.float32, None).tolist()
    kind = _main_type(header, types)
    raw["dtype"] = str(PLAIN.get(kind, torch.bfloat16)).removeprefix("torch.")
    return build_config(raw, path)


def _main_type(header: GGUFHeader, types: Mapping[int, str]) -> str:
    """The type that holds the most weights; norms are always F32 and never decide."""
    totals = dict.fromkeys(types.values(), 0)
    for tensor in header.tensors.values():
        totals[types[tensor.type_id]] += math.prod(tensor.shape)
    return max(totals, key=lambda name: totals[name], default="F32")


def _quantization(header: GGUFHeader, types: Mapping[int, str]) -> str | None:
    """The name people know the file by (`Q4_K_M` mixes several types), if any of its tensors is quantised."""
    from gguf import LlamaFileType

    if all(name in PLAIN for name in types.values()):
        return None
    file_type = header.metadata.get("general.file_type")
    known = {int(t): t.name for t in LlamaFileType}
    name = known.get(file_type, "").removeprefix("MOSTLY_") if isinstance(file_type, int) else ""
    return name if name and name not in ("ALL_F32", "F16", "BF16", "GUESSED") else _main_type(header, types)


def _map(tensor: GGUFTensor, rows: int) -> npt.NDArray[np.uint8]:
    """The tensor's bytes [rows, bytes of a row], copy-on-write so that torch accepts them; unmapped when the last view goes."""
    try:
        return np.memmap(tensor.file, np.uint8, "c", tensor.offset, (rows, tensor.num_bytes // rows))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{tensor.file} can't be read any more ({error}); did the file change?") from error


def _plain(tensor: GGUFTensor, dtype: torch.dtype, order: npt.NDArray[np.int64] | None) -> torch.Tensor:
    data = _map(tensor, tensor.shape[0])
    return torch.from_numpy(data if order is None else data[order]).view(dtype).view(tensor.shape)


def _dequantize(tensor: GGUFTensor, order: npt.NDArray[np.int64] | None) -> torch.Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    out = torch.empty(tensor.shape, dtype=torch.float32)
    rows = math.prod(tensor.shape[:-1])
    if order is not None and rows != len(order):
        raise ModelLoadError(f"{tensor.file}: a quantised bias {list(tensor.shape)} can't be put into rotary order")
    data, flat = _map(tensor, rows), out.view(rows, -1).numpy()
    step = max(1, CHUNK_ELEMENTS // flat.shape[1])
    with np.errstate(all="ignore"):  # a scale that isn't finite is the file's own
        for begin in range(0, rows, step):
            part = data[begin : begin + step] if order is None else data[order[begin : begin + step]]
            flat[begin : begin + step] = dequantize(np.asarray(part), GGMLQuantizationType(tensor.type_id))
    return out
