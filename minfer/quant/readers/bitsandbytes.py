"""bitsandbytes checkpoints (Dettmers 2022, 2023): NF4 and FP4 in blocks, and LLM.int8().

4 bits: the matrix is read as one long row of N K values, two a byte, the first in the high half; each block of `blocksize`
shares a largest magnitude:

    weight                                   uint8 [N K / 2, 1], or the same bytes as a float type (bnb_4bit_quant_storage)
    weight.quant_map                         float32 [16], the values of the codes
    weight.absmax                            float32 [N K / blocksize], or uint8 if quantised once more:
                                             nested_quant_map[absmax] * nested_absmax[block / nested_blocksize] + nested_offset
    weight.quant_state.bitsandbytes__nf4     uint8: JSON with blocksize, shape, dtype, nested_offset, ...

8 bits: weight int8 [N, K], SCB float32 [N]; weight = code * SCB / 127. The columns that LLM.int8() multiplies in float16 are
rounded in the file like all others, so nothing more is stored for them.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from minfer.errors import ModelLoadError
from minfer.quant.bits import as_bytes, unpack_nibbles
from minfer.quant.elements import Element
from minfer.quant.groups import expand_blocks, expand_runs
from minfer.quant.packed import PackedWeight, QuantScheme
from minfer.quant.readers.base import FLOATS, Headers, MatrixReader, Settings, StoredMatrix, Tensors, expect, whole

STATES: dict[str, Element] = {
    "weight.quant_state.bitsandbytes__nf4": "nf4",
    "weight.quant_state.bitsandbytes__fp4": "table4",  # their FP4 orders and scales its values unlike OCP's
}
BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
MAX_STATE = 10_000  # bytes of JSON; real ones have about 200
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
ONE_127TH = 7.874015718698502e-3  # as their dequantiser has it


class BitsAndBytesReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        self.label = "bitsandbytes, " + ("8 bits" if settings.get("load_in_8bit") else f"{settings.get('bnb_4bit_quant_type', 'fp4')}")

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        state = next((state for state in STATES if state in headers), None)
        if state is not None:
            return _matrix_4bit(state, shape, headers)
        if "SCB" in headers:
            expect(headers, "weight", shape, ("I8",))
            expect(headers, "SCB", (shape[0],), FLOATS)
            return StoredMatrix(("weight", "SCB"), partial(_unpack_8bit, shape), ("weight_format",))
        if any(end.startswith("weight.") for end in headers):
            raise ModelLoadError("it has no weight.quant_state.bitsandbytes__nf4 or __fp4, which says how it was packed")
        return None


def _matrix_4bit(state: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix:
    n, k = shape
    weight = headers.get("weight")
    if weight is None or weight.dtype not in BYTES:
        raise ModelLoadError(f"its 4-bit weight is {'missing' if weight is None else f'of type {weight.dtype}'}")
    count = BYTES[weight.dtype]
    for size in weight.shape:
        count *= size
    if n * k % 2 or count != n * k // 2:
        raise ModelLoadError(f"its weight has {count} bytes, but 4 bits for {[n, k]} take {n * k / 2:g}")
    expect(headers, state, tuple(headers[state].shape), ("U8",))
    if len(headers[state].shape) != 1 or headers[state].shape[0] > MAX_STATE:
        raise ModelLoadError(f"its {state} is {list(headers[state].shape)}, expected a short text")
    expect(headers, "weight.quant_map", (16,), ("F32",))
    absmax = headers.get("weight.absmax")
    if absmax is None or absmax.dtype not in ("F32", "U8") or len(absmax.shape) != 1:
        raise ModelLoadError("its weight.absmax must be a row of F32 or U8")
    names: tuple[str, ...] = ("weight", state, "weight.quant_map", "weight.absmax")
    if absmax.dtype == "U8":
        expect(headers, "weight.nested_quant_map", (256,), ("F32",))
        names += NESTED
    return StoredMatrix(names, partial(_unpack_4bit, state, shape))


def _unpack_4bit(state: str, shape: tuple[int, int], tensors: Tensors) -> PackedWeight:
    settings = _state(tensors[state])
    if list(settings.get("shape", shape)) != list(shape):
        raise ModelLoadError(f"its quant_state is of a matrix {settings['shape']}, not {list(shape)}")
    run = whole(settings, "blocksize", 64)
    absmax = tensors["weight.absmax"]
    if absmax.dtype == torch.uint8:
        absmax = _nested(absmax, settings, tensors)
    scales, group = expand_runs(absmax, shape, run)
    codes = unpack_nibbles(as_bytes(tensors["weight"].flatten()), high_first=True).view(shape).view(torch.int8)
    levels = tensors["weight.quant_map"].float()
    if not bool(torch.isfinite(levels).all()):
        raise ModelLoadError("its quant_map is not all finite; the file is damaged")
    return PackedWeight(codes, scales, None, QuantScheme(STATES[state], group, True), levels=levels)


def _state(data: torch.Tensor) -> dict[str, Any]:
    try:
        settings = json.loads(bytes(data.tolist()))
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"its quant_state is not JSON: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("shape", []), list):
        raise ModelLoadError("its quant_state must be a JSON object with a list as shape")
    return settings


def _nested(absmax: torch.Tensor, settings: dict[str, Any], tensors: Tensors) -> torch.Tensor:
    run, offset = whole(settings, "nested_blocksize", 256), settings.get("nested_offset")
    if not isinstance(offset, int | float):
        raise ModelLoadError(f"its quant_state has nested_offset={offset!r}; expected a number")
    scales, _ = expand_runs(tensors["weight.nested_absmax"].float(), (absmax.numel(), 1), run)
    return tensors["weight.nested_quant_map"][absmax.int()] * scales[:, 0] + offset


def _unpack_8bit(shape: tuple[int, int], tensors: Tensors) -> PackedWeight:
    scales, group = expand_blocks(tensors["SCB"].float() * ONE_127TH, shape, (1, shape[1]))
    return PackedWeight(tensors["weight"].contiguous(), scales, None, QuantScheme("int8", group, True, "int8"))
