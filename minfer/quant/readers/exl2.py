"""EXL2 checkpoints (ExLlamaV2): GPTQ's method with 2 to 8 bits, which differ from one run of inputs to the next.

Inputs were put in the order of their importance, most important first; each group of them has a width of its own, wider ones first:

    q_invperm     int32 [K]        input k lies in row q_invperm[k]
    q_groups      int16 [2 G]      for each group its bits, and where its words begin
    q_weight      int32 [W, N']    each column a stream of codes, lowest bits first, from group to group; N' is N in steps of 32
    q_scale       int32 [G, N' / 8] a nibble s for each group and output
    q_scale_max   float16 [G]      scale = (s + 1)^2 / 256 * q_scale_max

    weight = scale * (code - 2^(bits - 1))

A group's rows follow from its words, the last one's from what is left of K. Nothing is rounded here: a matrix of at most 4 bits
becomes int4, others int8, in groups that divide all of the file's.

Left out: EXL3, whose trellis codes are another matter.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from minfer.errors import ModelLoadError
from minfer.quant.bits import unpack_continuous
from minfer.quant.elements import Element
from minfer.quant.packed import PackedWeight, QuantScheme
from minfer.quant.readers.base import Headers, MatrixReader, Settings, StoredMatrix, Tensors, expect

BITS = (2, 3, 4, 5, 6, 8)
GROUP = 32  # what kernels like; the files' groups are multiples of it


class EXL2Reader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        bits = settings.get("bits")
        if not isinstance(bits, int | float) or not 0 < bits <= 8:
            raise ModelLoadError(f"quantization_config has bits={bits!r}; expected the average width, a number up to 8")
        self.label = f"EXL2, {bits:g} bits on average"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if "q_weight" not in headers:
            return None
        n, k = shape
        width = -(-n // 32) * 32
        groups = headers["q_scale_max"].shape[0] if "q_scale_max" in headers and len(headers["q_scale_max"].shape) == 1 else 0
        if not 1 <= groups <= k:
            raise ModelLoadError("its tensor 'q_scale_max' is missing or not one number a group")
        words = headers["q_weight"].shape[0] if len(headers["q_weight"].shape) == 2 else 0
        expect(headers, "q_weight", (words, width), ("I32",))
        expect(headers, "q_scale", (groups, width // 8), ("I32",))
        expect(headers, "q_scale_max", (groups,), ("F16",))
        expect(headers, "q_groups", (2 * groups,), ("I16",))
        expect(headers, "q_invperm", (k,), ("I32", "I16"))
        names = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
        return StoredMatrix(names, partial(_unpack, shape), ("q_perm", "q_group_map"))


def _unpack(shape: tuple[int, int], tensors: Tensors) -> PackedWeight:
    n, k = shape
    pairs = tensors["q_groups"].view(torch.uint16).long().view(-1, 2).tolist()
    sizes = _sizes(pairs, k, tensors["q_weight"].shape[0])
    order = tensors["q_invperm"].long() % 2**16
    if not torch.equal(order.sort().values, torch.arange(k)):
        raise ModelLoadError("its q_invperm is not an order of the inputs; the file is damaged")
    columns = tensors["q_weight"].T[:n]
    parts = []
    for (bits, first), size in zip(pairs, sizes, strict=True):
        words = columns[:, first : first + -(-size * bits // 32)]
        parts.append(unpack_continuous(words, bits, size).view(torch.int8) - 2 ** (bits - 1))
    nibbles = unpack_continuous(tensors["q_scale"], 4, tensors["q_scale"].shape[1] * 8)[:, :n].float()
    scales = (nibbles + 1) ** 2 / 256 * tensors["q_scale_max"].float()[:, None]  # [G, N]
    run = math.gcd(GROUP, *sizes)
    scales = scales.repeat_interleave(torch.tensor([size // run for size in sizes]), 0).T.contiguous()
    element: Element = "int4" if all(bits <= 4 for bits, _ in pairs) else "int8"
    return PackedWeight(torch.cat(parts, 1), scales, None, QuantScheme(element, run, True), input_order=order.argsort())


def _sizes(pairs: list[list[int]], k: int, words: int) -> list[int]:
    """Inputs of each group. Raises ModelLoadError where widths, places and K don't fit together."""
    sizes: list[int] = []
    for index, (bits, first) in enumerate(pairs):
        end = pairs[index + 1][1] if index + 1 < len(pairs) else words
        if bits not in BITS or not 0 <= first < end <= words or (index == 0 and first):
            raise ModelLoadError(f"group {index} of its q_groups has {bits} bits in words {first} to {end} of {words}, which can't be")
        size = (end - first) * 32 // bits if index + 1 < len(pairs) else k - sum(sizes)
        if size < 1 or -(-size * bits // 32) != end - first:
            raise ModelLoadError(f"group {index} of its q_groups has {end - first} words of {bits} bits for {size} inputs")
        sizes.append(size)
    return sizes
