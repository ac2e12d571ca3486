"""`--quant awq`, `gptq` and `smoothquant` of an unquantised model: calibrated once, kept in the cache folder, then run like any checkpoint.

These need to see a model's inputs, so nothing can be done while it loads. The model writes its own calibration samples (few and
short: somebody waits; `minfer quantize` has the longer ones and all the settings), `quantize_model` makes a checkpoint in the
standard format, and a list of its files' sizes and checksums is written last. An interrupted run goes on where it stopped; an
entry whose files don't match the list is removed and made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minfer.config import CALIBRATED, EngineConfig
from minfer.engine.progress import Progress, progress_bar
from minfer.errors import ConfigError, ModelLoadError
from minfer.loader import Checkpoint, open_checkpoint, quantised_twin, resolve_model
from minfer.loader.weight_cache import entry_folder, file_identity
from minfer.quantize import LayerReport, Recipe, quantize_model

logger = logging.getLogger("minfer.load")

SAMPLES, SAMPLE_TOKENS = 64, 256
GROUPS = (128, 64, 32)
LIST = "minfer-files.json"
CHUNK_BYTES = 2**24


def calibrated(config: EngineConfig, on_phase: Callable[[str], None] = lambda name: None) -> EngineConfig:
    """The config to load: `config` itself unless its `quant` needs calibration, then one that names the folder in the cache.

    Raises ModelLoadError or ConfigError for a model that can't be quantised so.
    """
    if config.quant not in CALIBRATED:
        return config
    if config.load_format == "dummy":
        raise ConfigError(f"quant {config.quant!r} needs a model to calibrate, which random weights are not; use int8 or int4")
    name = quantised_twin(config.model, config.quant)
    checkpoint = open_checkpoint(resolve_model(name, revision=config.revision, load_format=config.load_format))
    if config.quant in checkpoint.known_as() or (checkpoint.quantization is not None and checkpoint.format != "gguf"):
        return config  # the loader runs it as it is, or says what contradicts
    if checkpoint.quantization is not None:
        logger.warning("%s is quantised already (%s); %s rounds its weights again", name, checkpoint.quantization, config.quant)
    recipe = recipe_for(config.quant, checkpoint)
    settings = repr((recipe, SAMPLES, SAMPLE_TOKENS))
    folder = entry_folder(checkpoint.source.name, config.quant, file_identity(checkpoint.describe().files), settings)
    if not _is_whole(folder):
        _make(config, checkpoint, recipe, folder, on_phase)
    tokenizer = config.tokenizer or config.model
    return dataclasses.replace(config, model=str(folder), tokenizer=tokenizer, revision=None, load_format="auto", quant="auto")


def recipe_for(quant: str, checkpoint: Checkpoint) -> Recipe:
    """4 bits in the largest group of those in use that divides every row of the model."""
    inputs = {shape[1] for name, shape in checkpoint.config.tensor_shapes() if name.endswith("_proj.weight")}
    group = next((size for size in GROUPS if all(k % size == 0 for k in inputs)), -1)
    method: Any = quant
    return Recipe(method=method, group_size=group)


def _make(config: EngineConfig, checkpoint: Checkpoint, recipe: Recipe, folder: Path, on_phase: Callable[[str], None]) -> None:
    from minfer.engine.llm import LLM  # it is built on the engine, which is built on this file
    from minfer.engine.self_samples import self_samples

    def samples() -> list[list[int]]:
        on_phase(f"let the model write {SAMPLES} samples to calibrate {recipe.method} with")
        length = min(SAMPLE_TOKENS, checkpoint.config.max_position_embeddings - 1)
        plain = dataclasses.replace(config, quant="auto", max_model_len=length + 1)
        llm = LLM(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)})
        return self_samples(llm, SAMPLES, length, show_progress=watched)

    watched = sys.stderr.isatty()
    logger.warning("quantising %s to %s, once; the result is kept in %s", checkpoint.source.name, recipe.label, folder)
    with contextlib.ExitStack() as stack:
        bar: list[Progress] = []  # made when the first layer is done: the samples have one of their own before

        def on_layer(report: LayerReport) -> None:
            on_phase(f"quantise to {recipe.method}: layer {report.layer + 1} of {report.layers}")
            if not bar:
                bar.append(stack.enter_context(progress_bar(f"Quantising ({recipe.label})", report.layers, watched)))
            bar[0].advance()

        quantize_model(checkpoint, recipe, folder, samples, on_layer=on_layer)
    files = {file.name: [file.stat().st_size, _checksum(file)] for file in sorted(folder.iterdir()) if file.is_file()}
    (folder / LIST).write_text(json.dumps(files))


def _is_whole(folder: Path) -> bool:
    """Whether the entry is there and as it was written. One that is damaged is removed; one that is unfinished is left to go on with."""
    if not (folder / "config.json").is_file() and not (folder / LIST).is_file():
        return False
    try:
        files = json.loads((folder / LIST).read_bytes())
        if files and all((folder / name).stat().st_size == size and _checksum(folder / name) == crc for name, (size, crc) in files.items()):
            return True
        reason = "a file is not as it was written"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    logger.warning("%s is damaged and is made again: %s", folder, reason)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise ModelLoadError(f"{folder} is damaged and can't be removed ({error}); remove it by hand") from error
    return False


def _checksum(file: Path) -> int:
    crc = 0
    with file.open("rb") as f:
        while chunk := f.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
