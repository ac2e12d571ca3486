"""The seam between files and models: a `ModelSource` says where a model is, a `Checkpoint` says what it is and streams its tensors.

All readers share this small interface, so that whatever loads a model never asks which format it came in. A reader knows
every tensor's name, shape and size from the headers alone (`tensor_infos`); that is what lets a wrong file fail before any
weight is read, and `minfer inspect` answer at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from minfer.model_config import ModelConfig
from minfer.quant import PackedWeight

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

# A folder with tokenizer files, or a GGUF file's metadata; None where the checkpoint brings no tokenizer.
TokenizerSource = Path | Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model was found.

    kind: "folder" (Hugging Face layout), "gguf" (`path` is the file, the first one of a split), or "dummy" (random weights in
    the shape of `config`, a `config.json`-style dictionary, or of the folder or file at `path`).
    """

    kind: Literal["folder", "gguf", "dummy"]
    name: str
    path: Path | None = None
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: shape (rows first), type in the format's own spelling, bytes and file on disk."""

    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    file: Path | None


@dataclass(frozen=True)
class CheckpointSummary:
    """For people: what `minfer inspect` prints. `bytes_by_dtype` counts the tensors that are loaded, as they lie on disk."""

    format: str
    files: tuple[Path, ...]
    num_tensors: int
    num_bytes: int
    bytes_by_dtype: Mapping[str, int]
    quantization: str | None


class Checkpoint(ABC):
    """An opened and checked checkpoint: opening raises `ModelLoadError` if a tensor is missing, unknown or of a wrong shape."""

    format: ClassVar[str]

    def __init__(
        self,
        source: ModelSource,
        config: ModelConfig,
        tensor_infos: Mapping[str, TensorInfo],
        *,
        tokenizer_source: TokenizerSource = None,
        quantization: str | None = None,
    ) -> None:
        self.source = source
        self.config = config
        self.tensor_infos = tensor_infos
        self.tokenizer_source = tokenizer_source
        self.quantization = quantization

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """One tensor by its Hugging Face name, in the file's dtype (fp32 where the file is quantised). May share the file's pages."""

    def read_packed(self, name: str) -> PackedWeight | None:
        """A quantised matrix as the file packs it, without loss; None for one that isn't quantised or has no such form."""
        return None

    def known_as(self) -> frozenset[str]:
        """The values of `--quant` that describe the checkpoint as it is; none for one that isn't quantised."""
        return frozenset()

    def quantized(self, name: str, quantize: Callable[[torch.Tensor], PackedWeight]) -> PackedWeight:
        """One matrix as `quantize` makes it of the weights."""
        return quantize(self.read(name))

    def tensors(self, *, keep_packed: bool = False) -> Iterator[tuple[str, torch.Tensor | PackedWeight]]:
        """All tensors of `config.tensor_shapes()`, once each, in the file's order.

        One at a time: a consumer that copies each tensor and lets go of it peaks at its own weights + one tensor. Weights that
        have the right dtype already may be kept instead, they are pages of the mapped file. `keep_packed` asks for quantised
        matrices as they are, where they have a packed form; the others come dequantised.
        """
        for name in self.tensor_infos:
            packed = self.read_packed(name) if keep_packed else None
            yield name, self.read(name) if packed is None else packed

    def describe(self) -> CheckpointSummary:
        by_dtype: dict[str, int] = {}
        for info in self.tensor_infos.values():
            by_dtype[info.dtype] = by_dtype.get(info.dtype, 0) + info.num_bytes
        return CheckpointSummary(
            format=self.format,
            files=tuple(dict.fromkeys(info.file for info in self.tensor_infos.values() if info.file is not None)),
            num_tensors=len(self.tensor_infos),
            num_bytes=sum(by_dtype.values()),
            bytes_by_dtype=dict(sorted(by_dtype.items(), key=lambda item: -item[1])),
            quantization=self.quantization,
        )
