"""Random weights in the shape of a real model, for benchmarks and tests that need no download.

Speed depends on shapes and types, not on values, as long as the values stay finite: N(0, 0.02) matrices (the usual
initialisation) and norms of one keep activations of order one. Drawing seven billion normals takes a minute, so one pool
is drawn and each tensor reads it round and round from an offset of its own. The pool's length is prime, hence no two rows of
a matrix fall together. The text that comes out is noise.

Asked for quantised weights (`--quant int4`), it quantises a few rows of each matrix and repeats those: quantising all of a
7B model would take longer than most benchmarks of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from minfer.errors import ModelLoadError
from minfer.loader.checkpoint import TOKENIZER_FILES, Checkpoint, ModelSource, TensorInfo, TokenizerSource
from minfer.loader.hf_config import build_config, folder_config
from minfer.model_config import ModelConfig
from minfer.quant import PackedWeight

POOL_SIZE = 1048583  # prime
QUANTIZED_ROWS = 61  # prime
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class DummyCheckpoint(Checkpoint):
    """`source.config` (or the config of the folder or GGUF file at `source.path`) filled with seeded random weights."""

    format = "dummy"

    def __init__(self, source: ModelSource, *, seed: int = 0) -> None:
        config, tokenizer_source = _shape_of(source)
        self._dtype = DTYPES.get(config.dtype, torch.bfloat16)
        self._seed = seed
        self._pool = torch.randn(POOL_SIZE, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(self._dtype)
        size = self._dtype.itemsize
        infos = {
            name: TensorInfo(shape, str(self._dtype).removeprefix("torch."), torch.Size(shape).numel() * size, None)
            for name, shape in config.tensor_shapes()
        }
        super().__init__(source, config, infos, tokenizer_source=tokenizer_source)

    def read(self, name: str) -> torch.Tensor:
        shape = self.tensor_infos[name].shape
        return torch.ones(shape, dtype=self._dtype) if name.endswith("norm.weight") else self._draw(name, shape)

    def quantized(self, name: str, quantize: Callable[[torch.Tensor], PackedWeight]) -> PackedWeight:
        rows, inputs = self.tensor_infos[name].shape
        few = min(rows, QUANTIZED_ROWS)
        return quantize(self._draw(name, (few, inputs))).rows(torch.arange(rows) % few)

    def _draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        out = torch.empty(shape, dtype=self._dtype)
        flat, start = out.view(-1), zlib.crc32(f"{self._seed}/{name}".encode()) % POOL_SIZE
        for begin in range(-start, flat.numel(), POOL_SIZE):
            part = flat[max(begin, 0) : begin + POOL_SIZE]
            skip = max(-begin, 0)
            part.copy_(self._pool[skip : skip + part.numel()])
        return out


def _shape_of(source: ModelSource) -> tuple[ModelConfig, TokenizerSource]:
    if source.config is not None:
        return build_config(source.config, source.name), None
    if source.path is None:
        raise ModelLoadError(f"{source.name}: random weights need a config or a path to take the shape from")
    if source.path.suffix == ".gguf":
        return _shape_of_gguf(source.path)
    raw, generation = folder_config(source.path)
    has_tokenizer = any((source.path / file).is_file() for file in TOKENIZER_FILES)
    return build_config(raw, source.path / "config.json", generation), source.path if has_tokenizer else None


def _shape_of_gguf(path: Path) -> tuple[ModelConfig, TokenizerSource]:
    from minfer.loader.gguf import GGUFCheckpoint

    opened = GGUFCheckpoint(ModelSource(kind="gguf", name=path.name, path=path))
    return opened.config, opened.tokenizer_source
