"""What a reader of quantised checkpoints is: it looks at a matrix's headers, and says which tensors it takes and how to unpack them.

Two steps, because a wrong file should fail before any weight is read: `MatrixReader.matrix` sees names, shapes and types only,
and returns a `StoredMatrix`, whose `read` then gets the data of the tensors it asked for. A reader decides by what is in the
file whether a matrix is quantised at all: a layer that was left alone has a plain `weight` of a float type, whatever the
config's list of exceptions says (those lists are globs, substrings, regular expressions or class names, by tool).

Static scales of activations (`input_scale`) are accepted and not used: weights meet their inputs unrounded, or rounded with a
scale measured on the spot, which is at least as exact.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from minfer.errors import ModelLoadError
from minfer.quant.elements import has_nonfinite
from minfer.quant.packed import PackedWeight

FLOATS = ("F32", "F16", "BF16", "F64")
MAX_SCALE = 2.0**64  # what is below stays finite whatever it multiplies
MAX_PATTERN = 1000  # characters of a regular expression that a config may bring
Settings = Mapping[str, Any]
Tensors = Mapping[str, torch.Tensor]


class Header(Protocol):
    """What a file's header says of a tensor: its shape and its type in safetensors' spelling."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...


Headers = Mapping[str, Header]  # by the name's end: "qweight" of "model.layers.0.mlp.up_proj.qweight"


@dataclass(frozen=True)
class StoredMatrix:
    """A quantised matrix as it lies in the file: the tensors to read (ends of their names), and what to do with them.

    `unused` are tensors that belong to the matrix and change nothing here.
    """

    tensors: tuple[str, ...]
    unpack: Callable[[Tensors], PackedWeight]
    unused: tuple[str, ...] = ()

    def read(self, get: Callable[[str], torch.Tensor]) -> PackedWeight:
        """Raises ModelLoadError for numbers that can't be a model's: scales that aren't finite, huge, or all zero."""
        packed = self.unpack({name: get(name) for name in self.tensors})
        for name, values in (("scales", packed.scales), ("zero points", packed.mins)):
            if values is not None and not bool((values.abs() < MAX_SCALE).all()):
                raise ModelLoadError(f"its {name} are not all finite and below 2^64; the file is damaged")
        if has_nonfinite(packed.codes, packed.scheme.element):
            raise ModelLoadError("some of its weights are NaN or infinite; the file is damaged")
        if not bool(packed.scales.any()):
            raise ModelLoadError("its scales are all zero; the file is damaged")
        return packed.widened()


class MatrixReader(ABC):
    """One checkpoint's method and settings. Constructed from its `quantization_config`; raises ModelLoadError for what it can't read."""

    label: str  # for people: "GPTQ, 4 bits, groups of 128"

    @abstractmethod
    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        """How the matrix [N, K] of layer `name` ("model.layers.0.mlp.up_proj") is stored; None if it is not quantised."""


def expect(headers: Headers, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], why: str = "") -> None:
    """The tensor must be there, of this shape and one of these types; `why` says which settings ask for that."""
    header = headers.get(name)
    if header is None:
        raise ModelLoadError(f"its tensor {name!r} is missing")
    if tuple(header.shape) != shape or header.dtype not in dtypes:
        asked = f"{list(shape)} of {' or '.join(dtypes)}" + (f" with {why}" if why else "")
        raise ModelLoadError(f"its tensor {name!r} is {list(header.shape)} of {header.dtype}, expected {asked}")


def refuse(what: str, instead: str) -> NoReturn:
    """For what is sound but can't be read (yet): names it, and says what works."""
    raise ModelLoadError(f"{what} is not supported; {instead}")


def whole(settings: Settings, name: str, default: Any = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
    """A whole number of the settings; -1 and None mean `default` where there is one."""
    value = settings.get(name)
    if value is None or (value == -1 and default is not None):
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ModelLoadError(f"quantization_config has {name}={settings.get(name)!r}; expected a whole number from {low} to {high}")
    return value


def text(settings: Settings, name: str, default: str) -> str:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise ModelLoadError(f"quantization_config has {name}={value!r}; expected a string")
    return value.lower()


def mapping(settings: Settings, name: str) -> Settings:
    value = settings.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ModelLoadError(f"quantization_config has {name}={value!r}; expected an object")
    return value


def matches(pattern: str, name: str) -> bool:
    """Whether a config's regular expression matches at the start of a layer's name."""
    if len(pattern) > MAX_PATTERN:
        raise ModelLoadError(f"quantization_config has a regular expression of {len(pattern)} characters")
    try:
        return re.match(pattern, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelLoadError(f"quantization_config has {pattern!r}, which is not a regular expression: {error}") from error
