"""compressed-tensors checkpoints (llm-compressor, AutoRound, and many others), in every format but the sparse ones.

    pack-quantized          weight_packed int32, weight_scale, weight_shape; asymmetric: weight_zero_point packed along N
    int-, float-, naive-    weight int8 or fp8 [N, K], weight_scale; asymmetric: weight_zero_point int8
    nvfp4-pack-quantized    weight_packed uint8, weight_scale e4m3, weight_global_scale (divided by)
    mxfp4-, mxfp6-pack-     weight_packed uint8, weight_scale uint8;  mxfp8-quantized: weight e4m3, weight_scale uint8

Packed integers are stored plus 2^(bits - 1). With 3, 5, 6 and 7 bits there are two layouts under one name: packages up to 0.17
leave the top bits of each word unused, those from 0.20 pack a continuous stream; the width of `weight_packed` tells which.
Weights belong to a scheme by `config_groups`: class names, layer names, or regular expressions after "re:".

Left out: sparse formats, transforms (they rotate activations at run time), and `marlin-24`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from minfer.errors import ModelLoadError
from minfer.quant.bits import unpack_continuous, unpack_padded
from minfer.quant.groups import grid_shape, integers
from minfer.quant.packed import PackedWeight
from minfer.quant.readers.base import (
    FLOATS,
    Headers,
    MatrixReader,
    Settings,
    StoredMatrix,
    Tensors,
    expect,
    mapping,
    matches,
    refuse,
    text,
    whole,
)
from minfer.quant.readers.floats import Block, fp8_matrix, is_fp8, mx_matrix, nvfp4_matrix
from minfer.quant.readers.fp8 import read_block
from minfer.quant.readers.gptq import gathered

PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
SMALL_FLOATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized")
FORMATS = ("pack-quantized", *PLAIN, *SMALL_FLOATS, "dense")
UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point", "weight_shape")


@dataclass(frozen=True)
class WeightScheme:
    """One of `config_groups`: how its layers' weights were quantised. group_size None: scales are per channel or coarser."""

    targets: tuple[str, ...]
    format: str
    bits: int
    strategy: str
    group_size: int | None
    block: Block | None
    symmetric: bool
    activation: Literal["none", "int8", "fp8"]


class CompressedTensorsReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        sparsity = mapping(settings, "sparsity_config")
        if text(sparsity, "format", "dense") != "dense":
            refuse(f"compressed-tensors' sparse format {sparsity['format']!r}", "use a dense checkpoint")
        if mapping(mapping(settings, "transform_config"), "config_groups"):
            refuse("a compressed-tensors checkpoint with transforms", "use one made without rotations (QuIP, SpinQuant)")
        groups = mapping(settings, "config_groups")
        if not groups:
            raise ModelLoadError("quantization_config has no config_groups, which say how compressed-tensors packed the weights")
        default = text(settings, "format", "dense")
        self._schemes = [_scheme(mapping(groups, name), default) for name in groups]
        formats = dict.fromkeys(scheme.format for scheme in self._schemes)
        self.label = f"compressed-tensors, {', '.join(formats)}, {'/'.join(str(s.bits) for s in self._schemes)} bits"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if "weight_packed" not in headers and ("weight" not in headers or headers["weight"].dtype in FLOATS):
            return None
        stored = _matrix(self._scheme_of(name), shape, headers)
        return replace(stored, unused=UNUSED)

    def _scheme_of(self, name: str) -> WeightScheme:
        """The group that names the layer, first by name or regular expression, then by class."""
        for scheme in self._schemes:
            for target in scheme.targets:
                if target == name or (target.startswith("re:") and matches(target.removeprefix("re:"), name)):
                    return scheme
        for scheme in self._schemes:
            if ("Embedding" if name.endswith("embed_tokens") else "Linear") in scheme.targets:
                return scheme
        raise ModelLoadError("it is quantised, but none of quantization_config's config_groups targets it")


def _scheme(group: Settings, default_format: str) -> WeightScheme:
    weights, inputs = mapping(group, "weights"), mapping(group, "input_activations")
    if not weights:
        raise ModelLoadError("a group of quantization_config's config_groups has no 'weights'")
    form = text(group, "format", default_format)
    if form not in FORMATS:
        refuse(f"compressed-tensors' format {form!r}", f"use one of {', '.join(FORMATS)}")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ModelLoadError(f"quantization_config has targets={targets!r}; expected a list of names")
    if text(weights, "type", "int") not in ("int", "float"):
        refuse(f"compressed-tensors' type {weights['type']!r}", "known are int and float")
    size = weights.get("group_size")
    group_size = None if size in (None, -1) else whole(weights, "group_size")
    strategy = text(weights, "strategy", "tensor" if group_size is None else "group")
    return WeightScheme(
        targets=tuple(targets),
        format=form,
        bits=whole(weights, "num_bits", 8, high=8),
        strategy=strategy,
        group_size=group_size,
        block=read_block(weights, "block_structure"),
        symmetric=weights.get("symmetric", True) is True,
        activation=_activation(inputs),
    )


def _activation(inputs: Mapping[str, Any]) -> Literal["none", "int8", "fp8"]:
    if not inputs or inputs.get("num_bits") != 8:
        return "none"
    return "fp8" if inputs.get("type") == "float" else "int8"


def _matrix(scheme: WeightScheme, shape: tuple[int, int], headers: Headers) -> StoredMatrix:
    if scheme.format == "pack-quantized":
        return _packed_matrix(scheme, shape, headers)
    if scheme.format == "nvfp4-pack-quantized":
        names = {"weight": "weight_packed", "scale": "weight_scale", "global_scale": "weight_global_scale"}
        return nvfp4_matrix(shape, headers, **names, divide=True)
    if scheme.format == "mxfp8-quantized":
        return mx_matrix("fp8_e4m3", shape, headers)
    if scheme.format == "mxfp4-pack-quantized":
        return mx_matrix("fp4_e2m1", shape, headers, weight="weight_packed")
    if scheme.format == "mxfp6-pack-quantized":
        return mx_matrix("fp6_e2m3", shape, headers, weight="weight_packed")
    if is_fp8(headers):
        return fp8_matrix(shape, headers, block=_block(scheme, shape), activation=scheme.activation)
    return _byte_matrix(scheme, shape, headers)


def _block(scheme: WeightScheme, shape: tuple[int, int]) -> Block:
    """Rows and inputs that share a scale."""
    n, k = shape
    if scheme.strategy == "tensor":
        return n, k
    if scheme.strategy == "channel":
        return 1, k
    if scheme.strategy == "group" and scheme.group_size is not None and scheme.group_size <= k:
        return 1, scheme.group_size
    if scheme.strategy == "block" and scheme.block is not None:
        return scheme.block
    raise ModelLoadError(
        f"quantization_config's strategy {scheme.strategy!r} with group_size={scheme.group_size} and block_structure={scheme.block} "
        f"doesn't say what shares a scale in a matrix {[n, k]}"
    )


def _expect_scales(headers: Headers, name: str, grid: tuple[int, int], dtypes: tuple[str, ...]) -> None:
    """A scale for the matrix may be written as [] or [1] or [1, 1], those of rows as [N] or [N, 1]."""
    shorter: list[tuple[int, ...]] = [(grid[0],)] if grid[1] == 1 else []
    shorter += [()] if grid == (1, 1) else []
    found = tuple(headers[name].shape) if name in headers else grid
    expect(headers, name, found if found in shorter else grid, dtypes)


def _packed_matrix(scheme: WeightScheme, shape: tuple[int, int], headers: Headers) -> StoredMatrix:
    (n, k), bits, block = shape, scheme.bits, _block(scheme, shape)
    grid = grid_shape(shape, block)
    dense, padded = -(-k * bits // 32), -(-k // (32 // bits))
    found = headers["weight_packed"].shape if "weight_packed" in headers else ()
    width = found[1] if len(found) == 2 and found[1] in (dense, padded) else dense
    expect(headers, "weight_packed", (n, width), ("I32",), f"num_bits={bits}")
    _expect_scales(headers, "weight_scale", grid, FLOATS)
    names: tuple[str, ...] = ("weight_packed", "weight_scale")
    if not scheme.symmetric:
        _expect_packed_zeros(headers, bits, grid)
        names += ("weight_zero_point",)
    if "weight_g_idx" in headers:
        expect(headers, "weight_g_idx", (k,), ("I32", "I64"))
        names += ("weight_g_idx",)
    return StoredMatrix(names, partial(_unpack_packed, scheme, shape, block, width != dense))


def _expect_packed_zeros(headers: Headers, bits: int, grid: tuple[int, int]) -> None:
    """Packed along the rows; releases before 0.10 left them as they are, a signed byte each."""
    zeros = headers.get("weight_zero_point")
    if zeros is not None and zeros.dtype == "I8":
        _expect_scales(headers, "weight_zero_point", grid, ("I8",))
        return
    heights = (-(-grid[0] * bits // 32), -(-grid[0] // (32 // bits)))
    found = zeros.shape[0] if zeros is not None and zeros.shape else 0
    expect(headers, "weight_zero_point", (found if found in heights else heights[0], grid[1]), ("I32",), f"num_bits={bits}")


def _unpack_packed(scheme: WeightScheme, shape: tuple[int, int], block: Block, padded: bool, tensors: Tensors) -> PackedWeight:
    bits, grid = scheme.bits, grid_shape(shape, block)
    unpack = unpack_padded if padded else unpack_continuous
    codes = unpack(tensors["weight_packed"], bits, shape[1]).contiguous()
    scales, zeros = tensors["weight_scale"].reshape(grid), None
    if not scheme.symmetric:
        stored = tensors["weight_zero_point"]
        signed = stored.dtype == torch.int8
        zeros = stored.reshape(grid).int() + 2 ** (bits - 1) if signed else unpack(stored.T.contiguous(), bits, grid[0]).T
    if "weight_g_idx" not in tensors or bool((tensors["weight_g_idx"] < 0).all()):  # -1: the tool made it and never used it
        return integers(codes, bits, scales, zeros, block)
    return gathered(codes, bits, scales, zeros, tensors["weight_g_idx"].long(), block[1])


def _byte_matrix(scheme: WeightScheme, shape: tuple[int, int], headers: Headers) -> StoredMatrix:
    block = _block(scheme, shape)
    grid = grid_shape(shape, block)
    expect(headers, "weight", shape, ("I8",), f"format {scheme.format}")
    _expect_scales(headers, "weight_scale", grid, FLOATS)
    names: tuple[str, ...] = ("weight", "weight_scale")
    if not scheme.symmetric:
        _expect_scales(headers, "weight_zero_point", grid, ("I8",))
        names += ("weight_zero_point",)
    return StoredMatrix(names, partial(_unpack_bytes, scheme, block))


def _unpack_bytes(scheme: WeightScheme, block: Block, tensors: Tensors) -> PackedWeight:
    """Signed codes, one a byte, whatever `bits` says: they are shifted to unsigned 8-bit ones, and so are the zeros."""
    codes = tensors["weight"].contiguous().view(torch.uint8) + 128
    zeros = None if scheme.symmetric else tensors["weight_zero_point"].int() + 128
    packed = integers(codes, 8, tensors["weight_scale"], zeros, block)
    return replace(packed, scheme=replace(packed.scheme, activation=scheme.activation))
