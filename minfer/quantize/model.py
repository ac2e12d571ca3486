"""`quantize_model`: a checkpoint in, a quantised checkpoint out, one decoder layer in memory at a time.

For each layer: read its weights; run the calibration samples through it as it is and watch its inputs; quantise; run them
again through the quantised layer. What comes out is the next layer's input, so each layer is calibrated to what the ones
before it really give. Methods that need no data skip the running.

Memory: one layer's weights in float32 (three times while it is quantised), the sums of products (K x K for each of its four
inputs), and two copies of samples x seqlen x hidden floats. Embedding, head and norms stay in the model's own type.

A finished layer is on disk before the next begins. Going on after an interruption only runs the samples through what is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minfer.errors import ConfigError, ModelLoadError
from minfer.loader import Checkpoint
from minfer.loader.check import is_router
from minfer.quant import PackedWeight
from minfer.quant.algorithms.round_to_nearest import check_groups
from minfer.quant.readers import MatrixReader, create_reader
from minfer.quant.writers import MatrixWriter
from minfer.quantize.folder import OutputFolder
from minfer.quantize.layer import PackedMatrix, Weights, equalize, is_quantized, quantize_layer
from minfer.quantize.observe import InputStatistics, LayerRunner
from minfer.quantize.recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LayerReport:
    """weight_error: ||W' - W|| / ||W|| over the layer's matrices (after scales were folded in). output_error: the same of what the
    layer adds to its input, on the calibration samples; None without any. Both None for a layer done by an earlier run.
    """

    layer: int
    layers: int
    weight_error: float | None
    output_error: float | None
    seconds: float


def quantize_model(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    calibration: Callable[[], list[list[int]]] | None = None,
    *,
    on_layer: Callable[[LayerReport], None] = lambda report: None,
    max_layers: int | None = None,
) -> None:
    """Writes a checkpoint into the folder `out`. Going on with an interrupted run is the same call again.

    calibration: gives samples of equal length; called once, and only if the recipe needs data and no earlier run has kept some.
    max_layers: stop after so many layers, without finishing the checkpoint (to measure time and memory on a large model).
    Raises ConfigError for what can't be quantised so, ModelLoadError for a damaged source.
    """
    if checkpoint.quantization is not None and checkpoint.source.kind != "gguf":
        raise ConfigError(f"{checkpoint.source.name} is quantised already ({checkpoint.quantization}); start from the original weights")
    if checkpoint.config.moe is not None and recipe.needs:
        raise ConfigError(
            f"{recipe.method} needs the inputs of every matrix, and those of single experts aren't observed yet; quantise a mixture of "
            "experts with rtn, fp8, nf4 or an MX method"
        )
    writer = recipe.writer()
    for name, shape in checkpoint.config.tensor_shapes():
        if name.startswith("model.layers.") and is_quantized(name, shape):
            _check(name.removesuffix(".weight"), (shape[0], shape[1]), recipe, writer)
    folder = OutputFolder(out, _run(checkpoint, recipe))
    with torch.inference_mode():
        run = _Run(checkpoint, recipe, writer, folder, _samples(recipe, folder, calibration))
        count = checkpoint.config.num_layers
        for layer in range(count if max_layers is None else min(max_layers, count)):
            started = time.perf_counter()
            weight_error, output_error = run.layer(layer)
            on_layer(LayerReport(layer, count, weight_error, output_error, time.perf_counter() - started))
        if max_layers is None or max_layers >= count:
            run.rest()
            routers = [name.removesuffix(".weight") for name, _ in checkpoint.config.tensor_shapes() if is_router(name)]
            folder.finish(checkpoint, writer.settings(routers))


def _check(name: str, shape: tuple[int, int], recipe: Recipe, writer: MatrixWriter) -> None:
    try:
        check_groups(recipe.scheme_of(shape[1]), shape[1])
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    writer.check(name, shape)


def _run(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """What a later run must agree on to go on with this one."""
    tensors = [(name, info.shape, info.dtype) for name, info in checkpoint.tensor_infos.items()]
    shape = hashlib.sha256(json.dumps(tensors, default=str).encode()).hexdigest()[:16]
    return {"model": checkpoint.source.name, "tensors": shape, "recipe": dataclasses.asdict(recipe)}


def _samples(recipe: Recipe, folder: OutputFolder, calibration: Callable[[], list[list[int]]] | None) -> torch.Tensor | None:
    """[samples, seqlen] ids; None where no data is needed."""
    if not recipe.needs:
        return None
    samples = folder.saved_calibration()
    if samples is None:
        if calibration is None:
            raise ConfigError(f"{recipe.method} needs calibration data, and none was given")
        samples = calibration()
        folder.save_calibration(samples)
    if not samples or len({len(sample) for sample in samples}) != 1 or not samples[0]:
        raise ConfigError("calibration samples must be several lists of token ids, all of one length")
    return torch.tensor(samples)


class _Run:
    """The state between layers: the samples' hidden states, [samples, seqlen, H] float32."""

    def __init__(
        self, checkpoint: Checkpoint, recipe: Recipe, writer: MatrixWriter, folder: OutputFolder, samples: torch.Tensor | None
    ) -> None:
        self.checkpoint, self.recipe, self.writer, self.folder = checkpoint, recipe, writer, folder
        self.reader: MatrixReader = create_reader(writer.settings())
        self.dtype = DTYPES.get(checkpoint.config.dtype, torch.bfloat16)
        self.hidden: torch.Tensor | None = None
        if samples is not None:
            embedding = checkpoint.read("model.embed_tokens.weight")
            if int(samples.max()) >= embedding.shape[0] or int(samples.min()) < 0:
                raise ConfigError(f"calibration samples hold ids outside of the model's vocabulary of {embedding.shape[0]}")
            self.hidden = embedding[samples].float()
            self.runner = LayerRunner(checkpoint.config, samples.shape[1])

    def layer(self, index: int) -> tuple[float | None, float | None]:
        """Quantises one layer and writes it; (weight error, output error)."""
        prefix, piece = f"model.layers.{index}.", f"layer-{index:05d}"
        done = self.folder.load(piece)
        if done is not None:
            if self.hidden is not None:
                self._advance(index, self._read_back(prefix, done))
            return None, None
        weights = {name.removeprefix(prefix): self.checkpoint.read(name).float() for name in self._names(prefix)}
        seen: dict[str, InputStatistics] = {}
        before = self._observe(index, weights, seen) if self.hidden is not None else None
        equalize(weights, seen, self.recipe, self.checkpoint.config)
        packed = quantize_layer(weights, seen, self.recipe, prefix)
        seen.clear()
        tensors = dict(self._tensors(prefix, weights, packed))
        error = _weight_error(weights, packed)
        del weights, packed
        written = self._read_back(prefix, tensors)
        output_error = None if before is None else self._advance(index, written, before)
        self.folder.save(piece, tensors)
        return error, output_error

    def _names(self, prefix: str) -> Iterator[str]:
        return (name for name in self.checkpoint.tensor_infos if name.startswith(prefix))

    def _observe(self, index: int, weights: Weights, seen: dict[str, InputStatistics]) -> torch.Tensor:
        """Fills `seen`, and returns what the layer as it was makes of the samples."""
        assert self.hidden is not None, "there are samples"
        layer = self.runner.layer(index, weights)
        seen |= self.runner.observe(layer, self.recipe.needs, len(self.hidden))
        return torch.stack([self.runner.run(layer, sample) for sample in self.hidden])

    def _advance(self, index: int, weights: Weights, before: torch.Tensor | None = None) -> float:
        """Runs the samples through the quantised layer, in place; the relative error against `before`."""
        assert self.hidden is not None, "there are samples"
        layer = self.runner.layer(index, weights)
        error = total = 0.0
        for n, sample in enumerate(self.hidden):
            after = self.runner.run(layer, sample)
            if before is not None:
                error += float((after - before[n]).square().sum())
                total += float((before[n] - sample).square().sum())
            self.hidden[n] = after
        return (error / total) ** 0.5 if total else 0.0

    def _tensors(self, prefix: str, weights: Weights, packed: Mapping[str, PackedMatrix]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights.items():
            if name.removesuffix(".weight") not in packed:
                yield prefix + name, tensor.to(self.dtype)
        for name, matrix in packed.items():
            for end, tensor in self.writer.tensors(matrix.weight, matrix.input_scale).items():
                yield f"{prefix}{name}.{end}", tensor

    def _read_back(self, prefix: str, tensors: Mapping[str, torch.Tensor]) -> Weights:
        """The layer as whoever loads the checkpoint will see it, through the format's reader."""
        weights: Weights = {}
        shapes = dict(self.checkpoint.config.tensor_shapes())
        for name in self._names(prefix):
            layer, shape = name.removesuffix(".weight"), shapes[name]
            if not is_quantized(name, shape):
                weights[name.removeprefix(prefix)] = tensors[name].float()
                continue
            weights[name.removeprefix(prefix)] = read_matrix(self.reader, layer, (shape[0], shape[1]), tensors).dequantize()
        return weights

    def rest(self) -> None:
        """Embedding, final norm, head."""
        self.hidden = None
        names = [name for name in self.checkpoint.tensor_infos if not name.startswith("model.layers.")]
        self.folder.save("rest", {name: self.checkpoint.read(name).to(self.dtype) for name in names})


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    dtype: str


_SPELLING = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
}


def read_matrix(reader: MatrixReader, layer: str, shape: tuple[int, int], tensors: Mapping[str, torch.Tensor]) -> PackedWeight:
    """One matrix [N, K] out of a checkpoint's tensors that are in memory. Raises ModelLoadError if it isn't there whole."""
    ends = {name.removeprefix(f"{layer}."): tensor for name, tensor in tensors.items() if name.startswith(f"{layer}.")}
    headers = {end: _Header(tuple(tensor.shape), _SPELLING[tensor.dtype]) for end, tensor in ends.items()}
    stored = reader.matrix(layer, shape, headers)
    if stored is None:
        raise ModelLoadError(f"{layer} is not quantised; remove the unfinished folder and begin again")
    return stored.read(ends.__getitem__)


def _weight_error(weights: Weights, packed: Mapping[str, PackedMatrix]) -> float:
    error = total = 0.0
    for name, matrix in packed.items():
        weight = weights[f"{name}.weight"]
        error += float((matrix.weight.dequantize() - weight).square().sum())
        total += float(weight.square().sum())
    return (error / total) ** 0.5 if total else 0.0
