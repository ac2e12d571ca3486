"""Quantised safetensors folders: finds their settings, and folds the tensors of each quantised matrix into one entry.

A quantised `model.layers.0.mlp.up_proj` is several tensors (qweight, qzeros, scales, ...). `fold` asks the checkpoint's reader
(minfer/quant/readers) about every matrix, from headers alone, and replaces those tensors by one `...up_proj.weight` of the
model's shape; so the check of the whole checkpoint against its config, and whoever streams the weights, needn't know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minfer.errors import ModelLoadError
from minfer.loader.checkpoint import TensorInfo
from minfer.loader.hf_config import read_json
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.readers import MatrixReader, StoredMatrix, create_reader

# Where tools older than config.json's `quantization_config` wrote their settings, and which tool it was.
SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": None,
    "hf_quant_config.json": "modelopt",
}
# Scales of a quantised KV cache: ours keeps its own, or none.
KV_SCALES = re.compile(r".*\.(k_scale|v_scale|q_scale|kv_scale|prob_scale|[kv]_proj\.(output_scale|output_zero_point))")


def quantization_settings(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """From `config.json` or, as older tools do, a file beside it; None for a checkpoint that isn't quantised."""
    settings = config.get("quantization_config") or config.get("compression_config")
    for name, method in SIDE_FILES.items():
        if settings is None and (folder / name).is_file():
            settings = {"quant_method": method, **read_json(folder / name)}
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise ModelLoadError(f"{folder / 'config.json'}: quantization_config must be an object, not {str(settings)[:100]!r}")
    return settings


def find_reader(folder: Path, config: Mapping[str, Any]) -> MatrixReader | None:
    settings = quantization_settings(folder, config)
    if settings is None:
        return None
    try:
        return create_reader(settings)
    except ModelLoadError as error:
        raise ModelLoadError(f"{folder}: {error}") from error


@dataclass(frozen=True)
class QuantizedMatrix:
    """Where the tensors of a quantised matrix lie. `name` is the layer's, without `.weight`."""

    name: str
    stored: StoredMatrix
    files: Mapping[str, Path | None]

    def read(self, read_tensor: Callable[[Path | None, str], torch.Tensor]) -> PackedWeight:
        try:
            return self.stored.read(lambda end: read_tensor(self.files[end], f"{self.name}.{end}"))
        except ModelLoadError as error:
            where = self.files[self.stored.tensors[0]]
            raise ModelLoadError(f"{where}: {self.name}: {error}") from error

    def scheme(self, read_tensor: Callable[[Path | None, str], torch.Tensor]) -> QuantScheme:
        """As it was quantised, where `read` gives the element that kernels have; reads the matrix, as no header tells."""
        return self.stored.unpack({end: read_tensor(self.files[end], f"{self.name}.{end}") for end in self.stored.tensors}).scheme


def names_of(reader: MatrixReader, scheme: QuantScheme) -> frozenset[str]:
    """The values of `--quant` that describe matrices of this scheme from this reader.

    Which algorithm chose the codes a file rarely says: compressed-tensors holds what AWQ and GPTQ made alike.
    """
    label, bits4 = reader.label.split(",")[0], scheme.element == "int4"
    names: set[str] = {"mxfp4" if scheme.name == "mxfp4" else "fp8" if scheme.element.startswith("fp8") else scheme.element}
    if label == "compressed-tensors" and scheme.element == "int8" and scheme.activation == "int8":
        names.add("smoothquant")
    if label == "AWQ" or (bits4 and label in ("AutoRound", "compressed-tensors")):
        names.add("awq")
    if label == "GPTQ" or (bits4 and label in ("AutoRound", "compressed-tensors")):
        names.add("gptq")
    return frozenset(names)


@dataclass(frozen=True)
class Folded:
    """Headers after folding, and the quantised matrices among them by the name of their weight."""

    infos: dict[str, TensorInfo]
    matrices: dict[str, QuantizedMatrix]


def fold(
    reader: MatrixReader,
    found: Mapping[str, TensorInfo],
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    is_zero: Callable[[str], bool],
) -> Folded:
    """`shapes` are the model's tensors. `is_zero` looks at a tensor's data: GPTQ tools add biases of zeros to layers that have none."""
    wanted = dict(shapes)
    matrices: dict[str, QuantizedMatrix] = {}
    gone: set[str] = set()
    for layer, headers in _by_layer(found, wanted).items():
        shape = wanted[f"{layer}.weight"]
        stored = _stored(reader, layer, (shape[0], shape[1]), headers)
        if stored is None:
            continue
        files = {end: headers[end].file for end in stored.tensors}
        matrices[f"{layer}.weight"] = QuantizedMatrix(layer, stored, files)
        gone |= {f"{layer}.{end}" for end in (*stored.tensors, *stored.unused)}
        if "bias" in headers and f"{layer}.bias" not in wanted and is_zero(f"{layer}.bias"):
            gone.add(f"{layer}.bias")
    infos = {}
    for name, info in found.items():
        if name in gone:
            weight = next(f"{layer}.weight" for layer in _prefixes(name) if f"{layer}.weight" in matrices)
            infos[weight] = _one_entry(matrices[weight], wanted[weight], found, reader.label)
        elif not KV_SCALES.fullmatch(name):
            infos[name] = info
    return Folded(infos, matrices)


def _stored(reader: MatrixReader, layer: str, shape: tuple[int, int], headers: Mapping[str, TensorInfo]) -> StoredMatrix | None:
    try:
        return reader.matrix(layer, shape, headers)
    except ModelLoadError as error:
        where = next(iter(headers.values())).file
        raise ModelLoadError(f"{where}: {layer}: {error}") from error


def _by_layer(found: Mapping[str, TensorInfo], wanted: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, TensorInfo]]:
    """Headers of each layer that has a matrix, by the end of the name: {"model.layers.0.mlp.up_proj": {"qweight": ...}}."""
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, info in found.items():
        for layer in _prefixes(name):
            if len(wanted.get(f"{layer}.weight", ())) == 2:
                layers.setdefault(layer, {})[name[len(layer) + 1 :]] = info
                break
    return layers


def _prefixes(name: str) -> Iterable[str]:
    """a.b.c.d -> a.b.c, a.b, a: the layers that a tensor may belong to (bitsandbytes' names have dots of their own)."""
    for _ in range(name.count(".")):
        name = name.rpartition(".")[0]
        yield name


def _one_entry(matrix: QuantizedMatrix, shape: tuple[int, ...], found: Mapping[str, TensorInfo], label: str) -> TensorInfo:
    parts = [found[f"{matrix.name}.{end}"] for end in matrix.stored.tensors]
    return TensorInfo(shape, label, sum(part.num_bytes for part in parts), parts[0].file)
