"""Matrices of small floats, which several tools store in the same few ways: FP8 with scales of any shape, and the MX and NV formats.

    fp8      weight e4m3 or e5m2 [N, K]; scale: one, [N] or [N, 1], or a grid of blocks
    mxfp8    weight e4m3 [N, K], scale uint8 [N, K / 32] meaning 2^(s - 127)
    mxfp4    weight uint8 [N, K / 2], low nibble first, scale as mxfp8's
    mxfp6    weight uint8 [N, 3 K / 4], four E2M3 codes in three bytes, lowest bits first, scale as mxfp8's
    nvfp4    weight uint8 [N, K / 2], scale e4m3 [N, K / 16], and one float32 for the matrix

weight = scale * value, always a product, even where the tensor is called `weight_scale_inv`; only nvfp4's float32 is multiplied
with (ModelOpt) or divided by (compressed-tensors), which the caller says.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch

from minfer.errors import ModelLoadError
from minfer.quant.bits import unpack_continuous, unpack_nibbles
from minfer.quant.elements import Element
from minfer.quant.groups import expand_blocks, grid_shape
from minfer.quant.packed import PackedWeight, QuantScheme
from minfer.quant.readers.base import FLOATS, Headers, StoredMatrix, Tensors, expect

FP8: dict[str, Element] = {"F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
POWERS = ("U8", "F8_E8M0")  # how a file types a power of two
Activation = Literal["none", "int8", "fp8"]
Block = tuple[int, int]


def is_fp8(headers: Headers, name: str = "weight") -> bool:
    return name in headers and headers[name].dtype in FP8


def fp8_matrix(
    shape: tuple[int, int],
    headers: Headers,
    *,
    weight: str = "weight",
    scale: str = "weight_scale",
    block: Block | None = None,
    activation: Activation = "fp8",
) -> StoredMatrix:
    """`block` is (rows, inputs) that share a scale, as the config has it; None: taken from the number of scales."""
    expect(headers, weight, shape, tuple(FP8))
    header = headers.get(scale)
    if header is None:
        raise ModelLoadError(f"its weights are {headers[weight].dtype} but there is no {scale!r}")
    if header.dtype not in (*FLOATS, *POWERS):
        raise ModelLoadError(f"its tensor {scale!r} is of {header.dtype}, which is no scale's type")
    block = _block(shape, tuple(header.shape), block, scale)
    e8m0 = header.dtype in POWERS
    scheme = QuantScheme(FP8[headers[weight].dtype], block[1], True, activation, "e8m0" if e8m0 else "float")
    return StoredMatrix((weight, scale), partial(_unpack_fp8, shape, weight, scale, block, scheme))


def _block(shape: tuple[int, int], found: tuple[int, ...], asked: Block | None, name: str) -> Block:
    """What a scale of the shape `found` covers."""
    n, k = shape
    sizes = tuple(size for size in found if size != 1)  # ModelOpt writes [N / 128, 1, K / 128, 1]
    if not sizes:
        return n, k
    if asked is not None:
        grid = grid_shape(shape, asked)
        if sizes != tuple(size for size in grid if size != 1):
            raise ModelLoadError(f"its tensor {name!r} is {list(found)}, but blocks of {list(asked)} need {list(grid)}")
        return asked
    if sizes == (n,):
        return 1, k
    if len(found) == 2 and found[0] == n and k % found[1] == 0:
        return 1, k // found[1]
    raise ModelLoadError(f"its tensor {name!r} is {list(found)}, which fits neither the matrix {[n, k]} nor its rows")


def _unpack_fp8(shape: tuple[int, int], weight: str, scale: str, block: Block, scheme: QuantScheme, tensors: Tensors) -> PackedWeight:
    values = tensors[scale]
    scales, group = expand_blocks(powers_of_two(values) if scheme.scale_type == "e8m0" else values.float(), shape, block)
    return PackedWeight(tensors[weight].contiguous().view(torch.int8), scales, None, replace(scheme, group_size=group))


def mx_matrix(
    element: Element, shape: tuple[int, int], headers: Headers, *, weight: str = "weight", scale: str = "weight_scale"
) -> StoredMatrix:
    """mxfp8, mxfp6, mxfp4: one power of two for 32 inputs."""
    n, k = shape
    if k % 32:
        raise ModelLoadError(f"an MX format can't hold {k} inputs, which are no multiple of 32")
    width = {"fp4_e2m1": k // 2, "fp6_e2m3": k * 3 // 4}.get(element, k)
    expect(headers, weight, (n, width), ("U8",) if width < k else tuple(FP8))
    expect(headers, scale, (n, k // 32), POWERS)
    return StoredMatrix((weight, scale), partial(_unpack_mx, element, shape, weight, scale))


def _unpack_mx(element: Element, shape: tuple[int, int], weight: str, scale: str, tensors: Tensors) -> PackedWeight:
    codes = _codes(element, tensors[weight], shape[1])
    return PackedWeight(codes, powers_of_two(tensors[scale]), None, QuantScheme(element, 32, True, scale_type="e8m0"))


def nvfp4_matrix(shape: tuple[int, int], headers: Headers, *, weight: str, scale: str, global_scale: str, divide: bool) -> StoredMatrix:
    n, k = shape
    if k % 16:
        raise ModelLoadError(f"nvfp4 can't hold {k} inputs, which are no multiple of 16")
    expect(headers, weight, (n, k // 2), ("U8",))
    expect(headers, scale, (n, k // 16), ("F8_E4M3",))
    expect(headers, global_scale, tuple(headers[global_scale].shape) if global_scale in headers else (), FLOATS)
    if headers[global_scale].shape not in ((), (1,)):
        raise ModelLoadError(f"its tensor {global_scale!r} must be one number, not {list(headers[global_scale].shape)}")
    return StoredMatrix((weight, scale, global_scale), partial(_unpack_nvfp4, shape, weight, scale, global_scale, divide))


def _unpack_nvfp4(shape: tuple[int, int], weight: str, scale: str, global_scale: str, divide: bool, tensors: Tensors) -> PackedWeight:
    common = tensors[global_scale].float().flatten()
    small = tensors[scale].float()
    scales = small / common if divide else small * common
    codes = _codes("fp4_e2m1", tensors[weight], shape[1])
    return PackedWeight(codes, scales, None, QuantScheme("fp4_e2m1", 16, True, scale_type="e4m3"))


def _codes(element: Element, packed: torch.Tensor, k: int) -> torch.Tensor:
    if element == "fp4_e2m1":
        return unpack_nibbles(packed).view(torch.int8)
    if element == "fp6_e2m3":
        return unpack_continuous(packed, 6, k).contiguous().view(torch.int8)
    return packed.contiguous().view(torch.int8)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """E8M0 bytes -> float32 2^(e - 127); 255 is NaN."""
    return exponents.contiguous().view(torch.float8_e8m0fnu).float()
