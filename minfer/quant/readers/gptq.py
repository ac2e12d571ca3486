"""GPTQ checkpoints (Frantar 2022), as AutoGPTQ, GPTQModel and AutoRound write them.

    qweight int32 [K bits / 32, N]   codes packed along K, lowest bits first
    qzeros  int32 [G, N bits / 32]   zero points packed along N
    scales  float [G, N]
    g_idx   int32 [K]                the group of each input; absent or all zero: k // group_size

    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n])

Which zero is stored has a history. Version 1 (`checkpoint_format: gptq`, and all old files) stores zero - 1; GPTQModel writes
that by subtracting one from every field of a whole word, so a zero of 0 borrows from its neighbours and only adding to
the whole word gives it back. Version 2 stores the zero itself. Three bits are one stream of bits in both (version 1 subtracts
field by field), `gptq_p` packs in planes, and 5, 6 and 7 bits always do.

With desc_act the columns were quantised in order of importance, so groups are scattered over the inputs; they are gathered
here and the order kept in `PackedWeight.input_order`.

Left out: the repacked layouts of single kernels (marlin, bitblas, exllama): they don't say what they hold for other kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch

from minfer.errors import ModelLoadError
from minfer.quant.bits import unpack_continuous, unpack_planar
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

# How each format stores its zeros, by name: minus one or as they are.
MINUS_ONE = {"gptq": True, "gptq_v2": False, "gptq_p": False}


@dataclass(frozen=True)
class GPTQLayout:
    """Everything that decides how one matrix was packed. group_size None: one group spans the row."""

    bits: int
    group_size: int | None
    planar: bool = False
    minus_one: bool = True


class GPTQReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        version = text(settings, "checkpoint_format", text(settings, "format", "gptq"))
        if version not in MINUS_ONE:
            refuse(f"GPTQ's checkpoint_format {version!r}", "use a checkpoint in format gptq or gptq_v2")
        if text(settings, "pack_dtype", "int32") != "int32":
            refuse(f"GPTQ packed into {settings['pack_dtype']}", "use one packed into int32")
        self._version = version
        self._settings = settings
        self._dynamic = mapping(settings, "dynamic")
        self._layout("")  # so that settings that make no sense fail now
        group = settings.get("group_size")
        self.label = f"GPTQ, {settings['bits']} bits, {'one group a row' if group in (-1, None) else f'groups of {group}'}"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        return gptq_matrix(self._layout(name), shape, headers) if "qweight" in headers else None

    def _layout(self, name: str) -> GPTQLayout:
        """The settings of a layer: `dynamic` maps "+:regex" to what differs there ("-:regex" layers aren't quantised)."""
        settings = dict(self._settings)
        for key in self._dynamic:
            if not key.startswith("-:") and name and matches(key.removeprefix("+:"), name):
                settings.update(mapping(self._dynamic, key))
                break
        return gptq_layout(settings, self._version)


def gptq_layout(settings: Settings, version: str) -> GPTQLayout:
    bits = whole(settings, "bits", low=2, high=8)
    size = settings.get("group_size", -1)
    group = None if size in (-1, None) else whole(settings, "group_size")
    return GPTQLayout(bits, group, planar=version == "gptq_p" or bits in (5, 6, 7), minus_one=MINUS_ONE[version])


def gptq_matrix(layout: GPTQLayout, shape: tuple[int, int], headers: Headers) -> StoredMatrix:
    (n, k), bits = shape, layout.bits
    size = layout.group_size or k
    why = f"bits={bits} and group_size={layout.group_size or -1}"
    if k * bits % 32 or n * bits % 32 or (bits not in (2, 4, 8) and (k % 32 or n % 32)):
        raise ModelLoadError(f"GPTQ with {bits} bits can't pack a matrix {[n, k]} into whole words")
    if size > k:
        raise ModelLoadError(f"groups of {size} are longer than the {k} inputs of the matrix")
    _, groups = grid_shape(shape, (1, size))
    expect(headers, "qweight", (k * bits // 32, n), ("I32",), why)
    expect(headers, "qzeros", (groups, n * bits // 32), ("I32",), why)
    expect(headers, "scales", (groups, n), FLOATS, why)
    names: tuple[str, ...] = ("qweight", "qzeros", "scales")
    if "g_idx" in headers:
        expect(headers, "g_idx", (k,), ("I32", "I64"))
        names += ("g_idx",)
    return StoredMatrix(names, partial(_unpack, layout, shape, size))


def _unpack(layout: GPTQLayout, shape: tuple[int, int], size: int, tensors: Tensors) -> PackedWeight:
    n, k = shape
    unpack = unpack_planar if layout.planar else unpack_continuous
    codes = unpack(tensors["qweight"].T.contiguous(), layout.bits, k)  # [N, K]
    zeros = _zeros(tensors["qzeros"], layout, n).T  # [N, G]
    scales = tensors["scales"].T.float()
    if "g_idx" not in tensors:
        return integers(codes, layout.bits, scales, zeros, (1, size))
    return gathered(codes, layout.bits, scales, zeros, tensors["g_idx"].long(), size)


def gathered(
    codes: torch.Tensor, bits: int, scales: torch.Tensor, zeros: torch.Tensor | None, groups: torch.Tensor, size: int
) -> PackedWeight:
    """`integers` for groups that are scattered over the inputs: groups[k] is the group of input k."""
    if _in_order(groups, size):
        return integers(codes, bits, scales, zeros, (1, size))
    if int(groups.min()) < 0 or int(groups.max()) >= scales.shape[1]:
        raise ModelLoadError(f"its g_idx names a group outside of 0..{scales.shape[1] - 1}")
    order = torch.argsort(groups, stable=True)
    run = math.gcd(*torch.bincount(groups).tolist())  # a group's inputs are a whole number of runs
    index = groups[order][::run]
    return integers(codes[:, order], bits, scales[:, index], None if zeros is None else zeros[:, index], (1, run), input_order=order)


def _zeros(qzeros: torch.Tensor, layout: GPTQLayout, n: int) -> torch.Tensor:
    """[G, N] uint8."""
    if layout.planar:
        zeros = unpack_planar(qzeros, layout.bits, n)
    elif layout.minus_one and layout.bits in (2, 4, 8):
        ones = sum(1 << shift for shift in range(0, 32, layout.bits))
        words = (qzeros.long() + ones).bitwise_and(2**32 - 1)  # modulo 2^32, as the words were made
        return unpack_continuous(words.view(torch.int32)[:, ::2], layout.bits, n)  # the low halves of little-endian int64
    else:
        zeros = unpack_continuous(qzeros, layout.bits, n)
    return zeros + 1 & 2**layout.bits - 1 if layout.minus_one else zeros


def _in_order(groups: torch.Tensor, size: int) -> bool:
    """Whether groups are runs of inputs; tools that don't reorder write zeros, or nothing."""
    return not bool(groups.any()) or torch.equal(groups.long(), torch.arange(len(groups)) // size)
