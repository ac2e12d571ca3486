"""HQQ checkpoints (Badri 2023) in safetensors: weight = (W_q - zero) * scale, with zero points that are fractions.

The matrix is cut into groups by a reshape, and codes are packed across its *rows*:

    axis 1: [N K / g, g], a group is a row: g inputs of one output, as everywhere else
    axis 0: [g, N K / g], a group is a column, so neighbouring inputs share nothing (the library's old default)

    8, 6, 5 bits: a byte each; 4, 2, 1: the first half, quarter, ... of the rows in the top bits of a byte, and so on down;
    3: ten tenths of the rows, padded, in an int32 from bit 27 down

Each layer says in small tensors of its own (nbits, group_size, axis, view_as_float) how it was made; the config only repeats it.

Left out: scales that are quantised themselves (libraries before 0.2), and pickled qmodel.pt files.
"""

from __future__ import annotations

from functools import partial

import torch

from minfer.errors import ModelLoadError
from minfer.quant.bits import as_bytes
from minfer.quant.groups import expand_blocks, expand_runs, integers
from minfer.quant.packed import PackedWeight
from minfer.quant.readers.base import FLOATS, Headers, MatrixReader, Settings, StoredMatrix, Tensors, mapping, refuse, whole
from minfer.quant.readers.bitsandbytes import BYTES

ITEMS = ("nbits", "axis", "group_size")  # int32 numbers of each layer
UNUSED = (
    "packing", "view_as_float", "unpack_view_dtype", "quant_scale", "quant_zero", "compute_dtype", "offload_meta",
    "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
BITS = (1, 2, 3, 4, 5, 6, 8)


class HQQReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        config = mapping(settings, "quant_config")
        weights = [mapping(c, "weight_quant_params") for c in (config, *(v for v in config.values() if isinstance(v, dict)))]
        bits = sorted({str(w["nbits"]) for w in weights if "nbits" in w})
        self.label = f"HQQ, {'/'.join(bits) or 'unknown'} bits"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if "W_q" not in headers:
            return None
        if any(end in headers for end in ("zero_q", "scale_q", "zero_scale")):
            refuse("an HQQ checkpoint with quantised scales", "quantise again with hqq 0.2 or later")
        if headers["W_q"].dtype not in (*BYTES, "I32") or len(headers["W_q"].shape) != 2:
            raise ModelLoadError(f"its W_q is {list(headers['W_q'].shape)} of {headers['W_q'].dtype}, expected a packed matrix")
        for end in ("scale", "zero"):
            if end not in headers or headers[end].dtype not in FLOATS:
                raise ModelLoadError(f"its tensor {end!r} is {'missing' if end not in headers else headers[end].dtype}, expected floats")
        for end in ITEMS:
            if end not in headers or headers[end].shape not in ((), (1,)):
                raise ModelLoadError(f"its tensor {end!r} is missing or more than one number; was it saved by hqq 0.2 or later?")
        names = ("W_q", "scale", "zero", *ITEMS, *(("shape",) if "shape" in headers else ()))
        return StoredMatrix(names, partial(_unpack, shape), UNUSED)


def _unpack(shape: tuple[int, int], tensors: Tensors) -> PackedWeight:
    n, k = shape
    if "shape" in tensors and tensors["shape"].flatten().tolist() != [n, k]:
        raise ModelLoadError(f"it is a matrix {tensors['shape'].flatten()[:4].tolist()}, not {[n, k]}")
    item = {end: int(tensors[end].item()) for end in ITEMS}
    bits, axis, size = item["nbits"], item["axis"], whole(item, "group_size")
    if bits not in BITS or axis not in (0, 1) or size > n * k or n * k % size:
        raise ModelLoadError(f"nbits={bits}, axis={axis} and group_size={size} make no sense for a matrix {[n, k]}")
    grid = (n * k // size, size) if axis == 1 else (size, n * k // size)
    codes = _rows(tensors["W_q"], bits, grid).reshape(n, k)
    scales, zeros = (_wide(tensors[end].float(), shape, size, axis) for end in ("scale", "zero"))
    return integers(codes, bits, scales, zeros, (1, k // scales.shape[1]))


def _rows(packed: torch.Tensor, bits: int, grid: tuple[int, int]) -> torch.Tensor:
    """The reshaped matrix's codes, uint8 [rows, columns]."""
    rows, columns = grid
    data = as_bytes(packed).flatten()  # view_as_float stores the same bytes under a float type
    fields = {8: 1, 6: 1, 5: 1, 3: 10}.get(bits, 8 // bits)
    height = -(-rows // fields)
    if data.numel() != height * columns * (4 if bits == 3 else 1) or (bits != 3 and rows % fields):
        raise ModelLoadError(f"its W_q has {data.numel()} bytes, which {bits} bits for {list(grid)} can't give")
    words = (data.view(torch.int32) if bits == 3 else data).view(height, columns)
    parts = [(words >> (bits * place) & 2**bits - 1).to(torch.uint8) for place in reversed(range(fields))] if fields > 1 else [words]
    return torch.cat(parts)[:rows]


def _wide(values: torch.Tensor, shape: tuple[int, int], size: int, axis: int) -> torch.Tensor:
    """Scale or zero for each row and run of inputs; along axis 0 that means one for each weight."""
    n, k = shape
    if values.numel() != n * k // size:
        raise ModelLoadError(f"{[n, k]} in groups of {size} needs {n * k // size} scales and zeros, not {values.numel()}")
    if axis == 1:
        return expand_runs(values, shape, size)[0]
    return expand_blocks(values.flatten().repeat(size), shape, (1, 1))[0]
