"""`--quant`: what a checkpoint is run as. One that is so already runs as it is; an unquantised one is quantised while it is loaded.

`int8`, `int4`, `fp8`, `nf4` and `mxfp4` need no data (round-to-nearest), so each matrix is read, quantised and handed on by itself:
the model never lies in memory in both forms. The result is kept in the user's cache folder (weight_cache.py).

What is quantised are the matrices of the decoder layers, every expert's too. The embedding, the output head and the routers of experts
stay as the checkpoint has them: they are few of a large model's weights, and the ones where rounding shows most. A small model with a
large vocabulary pays for that: of SmolLM2's 135 million weights 28 million are the embedding, which is its head too.

A quantised GGUF file counts as a source for these too, because that is often the only form of a model at hand; its weights are
rounded twice then, and the log says so. Other quantised checkpoints don't: whoever asks for int8 of an AWQ model has mixed something up.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from minfer.config import CALIBRATED, Quant
from minfer.errors import ConfigError, ModelLoadError
from minfer.loader.check import EMBEDDING, HEAD, is_router
from minfer.loader.checkpoint import Checkpoint, TensorInfo
from minfer.loader.weight_cache import WeightCache, entry_folder, file_identity
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.algorithms import round_to_nearest
from minfer.quant.elements import ELEMENT_BITS, Element
from minfer.quant.packed import ScaleType

logger = logging.getLogger("minfer.load")
OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """`groups`: sizes to try, the first that divides a row is taken; a row that none divides is one group, if `whole_rows` allows.

    `search`: look for scales that clip. That tries twenty, which at load is worth nobody's time; the powers of two are two.
    """

    element: Element
    groups: tuple[int, ...]
    symmetric: bool = True
    scale_type: ScaleType = "float"
    whole_rows: bool = True
    search: bool = False

    def scheme(self, name: str, inputs: int) -> QuantScheme:
        size = next((group for group in self.groups if inputs % group == 0), inputs if self.whole_rows else None)
        if size is None:
            raise ModelLoadError(f"{name} has {inputs} inputs, which groups of {self.groups[-1]} don't divide; use another --quant")
        return QuantScheme(self.element, size, self.symmetric, scale_type=self.scale_type)


# The sizes are those in use: Q4_1's for int4, QLoRA's for nf4, the standard's for mxfp4, one scale a row for fp8.
RECIPES: dict[str, Recipe] = {
    "int8": Recipe("int8", (128, 64, 32)),
    "int4": Recipe("int4", (32,), symmetric=False),
    "fp8": Recipe("fp8_e4m3", ()),
    "nf4": Recipe("nf4", (64, 32)),
    "mxfp4": Recipe("fp4_e2m1", (32,), scale_type="e8m0", whole_rows=False, search=True),
}


class QuantizedOnLoad(Checkpoint):
    """`base` with the matrices of its layers quantised as `method` says. Raises ModelLoadError for sizes that don't fit it."""

    format = "quantised on load"

    def __init__(self, base: Checkpoint, method: str, cache: WeightCache | None, on_progress: OnProgress = lambda text: None) -> None:
        self._base, self._method, self._cache, self._on_progress = base, method, cache, on_progress
        self._schemes = {
            name: RECIPES[method].scheme(name, info.shape[1])
            for name, info in base.tensor_infos.items()
            if len(info.shape) == 2 and name not in (EMBEDDING, HEAD) and not is_router(name)
        }
        infos = {
            name: info if name not in self._schemes else TensorInfo(info.shape, method, _num_bytes(self._schemes[name], info), info.file)
            for name, info in base.tensor_infos.items()
        }
        super().__init__(base.source, base.config, infos, tokenizer_source=base.tokenizer_source, quantization=f"{method} while loading")

    @property
    def cache_hits(self) -> int:
        """Matrices that came from the cache so far."""
        return self._cache.hits if self._cache is not None else 0

    def read(self, name: str) -> torch.Tensor:
        packed = self.read_packed(name)
        return self._base.read(name) if packed is None else packed.dequantize()

    def read_packed(self, name: str) -> PackedWeight | None:
        if name not in self._schemes:
            return self._base.read_packed(name)
        packed = self._cache.get(name, self.tensor_infos[name].shape) if self._cache is not None else None
        if packed is None:
            packed = self._quantize(name)
            if self._cache is not None:
                self._cache.put(name, packed)
        return packed

    def tensors(self, *, keep_packed: bool = False) -> Iterator[tuple[str, torch.Tensor | PackedWeight]]:
        """The embedding and the head first: repacking them takes room for a copy, which later the layers fill."""
        done = 0
        for name in sorted(self.tensor_infos, key=lambda name: name not in (EMBEDDING, HEAD)):
            if name in self._schemes:
                self._on_progress(f"quantise to {self._method}: matrix {done + 1} of {len(self._schemes)}")
                done += 1
            packed = self.read_packed(name)
            yield name, self._base.read(name) if packed is None else packed if keep_packed else packed.dequantize()
            del packed
            _return_freed_memory()
        if self._cache is not None:
            logger.info("%s: %d of %d matrices from the cache %s", self._method, self.cache_hits, done, self._cache.folder)

    def _quantize(self, name: str) -> PackedWeight:
        search = RECIPES[self._method].search
        try:
            packed = self._base.quantized(name, lambda weight: round_to_nearest(weight, self._schemes[name], search=search))
        except ConfigError as error:
            raise ModelLoadError(f"{self.tensor_infos[name].file or self.source.name}: {name}: {error}") from error
        if packed.mins is None:
            return packed
        # A whole zero point times its scale takes more bits than float16 has. Rounding it shifts a group by less than a
        # hundredth of a step, and kernels can keep it in two bytes.
        return dataclasses.replace(packed, mins=packed.mins.half().float())


def quantized_as_asked(base: Checkpoint, quant: Quant, on_progress: OnProgress = lambda text: None) -> Checkpoint:
    """What to load for this `--quant`: `base` itself, or a checkpoint that quantises it. Raises ModelLoadError if the two contradict."""
    if quant in ("auto", "none") or quant in base.known_as():
        return base
    if quant in CALIBRATED and (base.quantization is None or base.format == "gguf"):
        raise ModelLoadError(
            f"--quant {quant} runs checkpoints made with it, and {base.source.name} is none; make one with "
            f"`minfer quantize {base.source.name} FOLDER --method {quant}` and run FOLDER, or use --quant int8 or int4, which need no data"
        )
    if base.quantization is not None:
        if base.format != "gguf":
            raise ModelLoadError(
                f"{base.source.name} is quantised already ({base.quantization}), which --quant {quant} contradicts; "
                "leave --quant out to run it as it is, or name the original model"
            )
        logger.warning("%s is quantised already (%s); --quant %s rounds its weights again", base.source.name, base.quantization, quant)
    return QuantizedOnLoad(base, quant, _cache_of(base, quant), on_progress)


def _cache_of(base: Checkpoint, quant: str) -> WeightCache | None:
    """None for weights that lie in no file."""
    files = base.describe().files
    if not files:
        return None
    return WeightCache(entry_folder(base.source.name, quant, file_identity(files), repr(RECIPES[quant])))


def _return_freed_memory() -> None:
    """Hands pages that were freed back to the system.

    Matrices in transit and the layers' own lie in one heap, so glibc keeps what the former leave between the latter: a GiB by
    the end of a 7B model. Other C libraries have no such function and, as far as is known, no such habit.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _num_bytes(scheme: QuantScheme, info: TensorInfo) -> int:
    """Codes as dense as kernels keep them, and two bytes for each scale and minimum."""
    n, k = info.shape
    return n * k * ELEMENT_BITS[scheme.element] // 8 + n * (k // scheme.group_size) * (2 if scheme.symmetric else 4)
