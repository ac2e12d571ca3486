"""FP8 checkpoints of `quant_method: fp8` (transformers, vLLM, DeepSeek) and `fbgemm_fp8` (Meta).

    weight e4m3 [N, K], and weight_scale (one, or one a row) or weight_scale_inv (one for each block of 128 x 128 weights)

Both are multiplied with; "inv" is only a name. Biases, heads and layers that were left out have plain weights.
"""

from __future__ import annotations

from minfer.errors import ModelLoadError
from minfer.quant.readers.base import Headers, MatrixReader, Settings, StoredMatrix, text
from minfer.quant.readers.floats import Block, fp8_matrix, is_fp8

UNUSED = ("input_scale", "activation_scale", "input_scale_ub")


class FP8Reader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        text(settings, "activation_scheme", "dynamic")
        self._block = read_block(settings, "weight_block_size")
        self.label = "FP8" + (f", blocks of {self._block[0]} x {self._block[1]}" if self._block else "")

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if not is_fp8(headers):
            return None
        inverse = "weight_scale_inv" in headers or (self._block is not None and "weight_scale" not in headers)
        scale = "weight_scale_inv" if inverse else "weight_scale"
        stored = fp8_matrix(shape, headers, scale=scale, block=self._block)
        return StoredMatrix(stored.tensors, stored.unpack, UNUSED)


def read_block(settings: Settings, name: str) -> Block | None:
    """[rows, inputs] of the settings."""
    value = settings.get(name)
    if value is None:
        return None
    sound = isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int and 0 < v < 2**31 for v in value)
    if not sound:
        raise ModelLoadError(f"quantization_config has {name}={value!r}; expected two positive whole numbers")
    return value[0], value[1]
