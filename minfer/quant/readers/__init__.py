"""Readers of quantised checkpoints: `create_reader` finds the one that a checkpoint's `quantization_config` names.

One file a format. A reader says of each matrix, from headers alone, whether and how it is quantised, and later makes a
`PackedWeight` of its tensors. What can't be read is refused here in one sentence, with what to use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minfer.errors import ModelLoadError
from minfer.quant.readers.aqlm import AQLMReader
from minfer.quant.readers.auto_round import AutoRoundReader
from minfer.quant.readers.awq import AWQReader
from minfer.quant.readers.base import Header, Headers, MatrixReader, Settings, StoredMatrix
from minfer.quant.readers.bitnet import BitNetReader
from minfer.quant.readers.bitsandbytes import BitsAndBytesReader
from minfer.quant.readers.compressed_tensors import CompressedTensorsReader
from minfer.quant.readers.exl2 import EXL2Reader
from minfer.quant.readers.fp8 import FP8Reader
from minfer.quant.readers.gptq import GPTQReader
from minfer.quant.readers.hqq import HQQReader
from minfer.quant.readers.modelopt import ModelOptReader
from minfer.quant.readers.quark import QuarkReader
from minfer.quant.readers.torchao import TorchAOReader

__all__ = ["INSTEAD", "METHODS", "Header", "Headers", "MatrixReader", "StoredMatrix", "create_reader", "quant_method"]

METHODS: dict[str, Callable[[Settings], MatrixReader]] = {
    "aqlm": AQLMReader,
    "auto-round": AutoRoundReader,
    "intel/auto-round": AutoRoundReader,
    "awq": AWQReader,
    "bitnet": BitNetReader,
    "bitsandbytes": BitsAndBytesReader,
    "compressed-tensors": CompressedTensorsReader,
    "exl2": EXL2Reader,
    "fbgemm_fp8": FP8Reader,
    "fp8": FP8Reader,
    "gptq": GPTQReader,
    "hqq": HQQReader,
    "inc": AutoRoundReader,
    "modelopt": ModelOptReader,
    "modelopt_fp4": ModelOptReader,
    "quark": QuarkReader,
    "torchao": TorchAOReader,
}
# Methods known by name that need more than unpacking, and what to use instead.
INSTEAD = {
    "mxfp4": "it is the format of gpt-oss, a family that is not supported yet",
    "exl3": "only ExLlamaV3 runs its trellis codes; use a GPTQ, AWQ or GGUF checkpoint of the model",
    "quanto": "use --quant int8 or int4 on the original model",
    "eetq": "use --quant int8 on the original model",
}
# Where a config names no method, a key that only one of them has.
_TELLTALE = {
    "load_in_4bit": "bitsandbytes",
    "load_in_8bit": "bitsandbytes",
    "config_groups": "compressed-tensors",
    "desc_act": "gptq",
    "w_bit": "awq",
    "quant_algo": "modelopt",
    "quantization": "modelopt",
    "in_group_size": "aqlm",
}


def quant_method(settings: Any) -> str:
    """The method's name in lower case; "unknown" where the settings don't say."""
    if not isinstance(settings, dict):
        raise ModelLoadError(f"quantization_config must be an object, not {settings!r:.100}")
    method = settings.get("quant_method")
    if method is None:
        return next((method for key, method in _TELLTALE.items() if key in settings), "unknown")
    return str(method).lower()


def create_reader(settings: Any) -> MatrixReader:
    """The reader for a `quantization_config`. Raises ModelLoadError if its method is unknown or its values make no sense."""
    method = quant_method(settings)
    if method not in METHODS:
        instead = INSTEAD.get(method, f"use the original model, a GGUF file of it, or one quantised with {', '.join(sorted(METHODS))}")
        raise ModelLoadError(f"the quantisation method {method!r} is not supported; {instead}")
    return METHODS[method](settings)
