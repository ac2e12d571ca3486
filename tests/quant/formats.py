"""Random matrices in every format, written straight from the formats' specifications: contents known, whatever tool is at hand.

Each maker returns the tensors of a layer of [N, K] and the float32 matrix they stand for, worked out from the random codes and
scales themselves, never by reading the tensors back. Shapes must be multiples of 32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Maker = Callable[[torch.Generator, int, int], tuple[Tensors, torch.Tensor]]
GROUP = 32
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip


@dataclass(frozen=True)
class Format:
    settings: dict[str, Any]
    make: Maker


def stream(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The last axis as one stream of bits, lowest first, in int32 words."""
    places = values.numpy().astype(np.uint8)[..., None] >> np.arange(bits) & 1
    packed = np.packbits(places.astype(np.uint8).reshape(*values.shape[:-1], -1), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32).copy())


def pairs(values: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """Two 4-bit values a byte."""
    first, second = values[..., 0::2].byte(), values[..., 1::2].byte()
    return first << 4 | second if high_first else second << 4 | first


def codes_of(rng: torch.Generator, n: int, k: int, levels: int = 16) -> torch.Tensor:
    return torch.randint(0, levels, (n, k), generator=rng)


def scales_of(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """Of float16's precision, as nearly all files have them: products with codes are then exact in float32."""
    return (torch.rand(shape, generator=rng) * 0.02 + 0.005).half()


def zeros_of(rng: torch.Generator, n: int, groups: int, levels: int = 16) -> torch.Tensor:
    return torch.randint(1, levels - 1, (n, groups), generator=rng)  # GPTQ's first format can't store 0


def wide(values: torch.Tensor, k: int) -> torch.Tensor:
    return values.float().repeat_interleave(k // values.shape[1], 1)


def gptq(bits: int, *, minus_one: bool, act_order: bool = False) -> Maker:
    def make(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
        codes, scales, zeros = codes_of(rng, n, k, 2**bits), scales_of(rng, n, k // GROUP), zeros_of(rng, n, k // GROUP, 2**bits)
        groups = torch.arange(k) // GROUP
        if act_order:
            groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(k))]  # the same for q, k and v, as in real files
        tensors = {
            "qweight": stream(codes, bits).T,
            "qzeros": stream((zeros - int(minus_one)).T.contiguous(), bits),
            "scales": scales.T,
            "g_idx": groups.int(),
        }
        return tensors, (codes - zeros[:, groups]) * scales.float()[:, groups]

    return make


AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


def awq_words(values: torch.Tensor) -> torch.Tensor:
    """[R, 8 C] -> int32 [R, C], nibble i of a word holding column AWQ_COLUMNS[i]."""
    return stream(values.reshape(len(values), -1, 8)[..., AWQ_COLUMNS].reshape(values.shape), 4)


def awq_gemm(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    codes, scales, zeros = codes_of(rng, n, k), scales_of(rng, n, k // GROUP), zeros_of(rng, n, k // GROUP)
    tensors = {"qweight": awq_words(codes.T), "qzeros": awq_words(zeros.T), "scales": scales.T}
    return tensors, (codes - wide(zeros, k)) * wide(scales, k)


def awq_gemv(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    groups = k // GROUP
    codes, scales, zeros = codes_of(rng, n, k), scales_of(rng, n, groups), zeros_of(rng, n, groups)
    width = -(-groups // 32) * 4  # groups of 32: words in fours
    room = [torch.zeros(n, 8 * width - groups, dtype=t.dtype) for t in (scales, zeros)]
    tensors = {
        "qweight": stream(codes, 4),
        "qzeros": stream(torch.cat((zeros, room[1]), 1), 4),
        "scales": torch.cat((scales, room[0]), 1),
    }
    return tensors, (codes - wide(zeros, k)) * wide(scales, k)


def ct_packed(bits: int, *, symmetric: bool) -> Maker:
    def make(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
        codes, scales = codes_of(rng, n, k, 2**bits), scales_of(rng, n, k // GROUP)
        tensors = {"weight_packed": stream(codes, bits), "weight_scale": scales, "weight_shape": torch.tensor([n, k])}
        if symmetric:
            return tensors, (codes - 2 ** (bits - 1)) * wide(scales, k)
        zeros = zeros_of(rng, n, k // GROUP, 2**bits)
        return {**tensors, "weight_zero_point": stream(zeros.T.contiguous(), bits).T}, (codes - wide(zeros, k)) * wide(scales, k)

    return make


def int8_rows(weight: str, scale: str) -> Maker:
    def make(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
        codes, scales = codes_of(rng, n, k, 255) - 127, scales_of(rng, n, 1).float() / 8
        return {weight: codes.to(torch.int8), scale: scales}, codes * scales

    return make


def fp8(block: tuple[int, int] | None, *, scale: str = "weight_scale", rank: int = 2, rows: bool = False) -> Maker:
    """One scale for the matrix, for each row, or for each block (the last ones cut off)."""

    def make(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
        weight = torch.randn(n, k, generator=rng).to(torch.float8_e4m3fn)
        across = (1, k) if rows else block or (n, k)
        grid = scales_of(rng, -(-n // across[0]), -(-k // across[1])).float() * 10
        full = grid.repeat_interleave(across[0], 0)[:n].repeat_interleave(across[1], 1)[:, :k]
        stored = grid[:, None, :, None] if rank == 4 else grid if block or rows else grid.reshape(())
        return {"weight": weight, scale: stored}, weight.float() * full

    return make


def mx_scales(rng: torch.Generator, n: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    exponents = torch.randint(118, 124, (n, groups), generator=rng)
    return exponents.byte(), 2.0 ** (exponents - 127).float()


def mxfp4(weight: str) -> Maker:
    def make(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
        codes, (stored, scales) = codes_of(rng, n, k), mx_scales(rng, n, k // 32)
        return {weight: pairs(codes), "weight_scale": stored}, E2M1[codes] * wide(scales, k)

    return make


def mxfp8(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    weight, (stored, scales) = torch.randn(n, k, generator=rng).to(torch.float8_e4m3fn), mx_scales(rng, n, k // 32)
    return {"weight": weight, "weight_scale": stored}, weight.float() * wide(scales, k)


def nvfp4(weight: str, common: str, *, divide: bool) -> Maker:
    def make(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
        codes = codes_of(rng, n, k)
        small = (torch.rand(n, k // 16, generator=rng) * 400 + 1).to(torch.float8_e4m3fn)
        factor = torch.tensor([2.0**13]) * 1.25
        scales = small.float() / factor if divide else small.float() * (1 / factor)
        return {weight: pairs(codes), "weight_scale": small, common: factor if divide else 1 / factor}, E2M1[codes] * wide(scales, k)

    return make


def bnb_nf4(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    """Blocks of 64 over the matrix as one row, their maxima stored in 8 bits once more."""
    codes, blocks = codes_of(rng, n, k), -(-n * k // 64)
    maxima = torch.randint(0, 256, (blocks,), generator=rng).byte()
    values, outer, offset = torch.rand(256, generator=rng) * 0.5 + 0.1, torch.rand(-(-blocks // 256), generator=rng) + 0.5, 0.25
    absmax = values[maxima.long()] * outer.repeat_interleave(256)[:blocks] + offset
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k], "nested_blocksize": 256}
    text = json.dumps({**state, "nested_dtype": "float32", "nested_offset": offset})
    tensors = {
        "weight": pairs(codes.flatten(), high_first=True)[:, None],
        "weight.absmax": maxima,
        "weight.quant_map": NF4.clone(),
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": values,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text.encode()), dtype=torch.uint8),
    }
    return tensors, (NF4[codes.flatten()] * absmax.repeat_interleave(64)[: n * k]).view(n, k)


def hqq(axis: int) -> Maker:
    def make(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
        rows, columns = (n * k // 64, 64) if axis == 1 else (64, n * k // 64)
        codes = codes_of(rng, rows, columns)
        one_each = (rows, 1) if axis == 1 else (1, columns)
        scales, zeros = scales_of(rng, *one_each), (torch.rand(one_each, generator=rng) * 15).half()
        half = rows // 2
        number = {"nbits": 4, "axis": axis, "group_size": 64}
        tensors = {
            "W_q": (codes[:half] << 4 | codes[half:]).byte(),
            "scale": scales,
            "zero": zeros,
            "shape": torch.tensor([n, k]),
            **{name: torch.tensor(value, dtype=torch.int32) for name, value in number.items()},
        }
        return tensors, ((codes - zeros.float()) * scales.float()).reshape(n, k)

    return make


def quark_int4(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    tensors, dense = awq_gemm(rng, n, k)
    return {"weight": tensors["qweight"], "weight_zero_point": tensors["qzeros"], "weight_scale": tensors["scales"]}, dense


def torchao_int8(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    tensors, dense = int8_rows("_weight_qdata", "_weight_scale")(rng, n, k)
    return {**tensors, "_weight_zero_point": torch.zeros(n, 1, dtype=torch.int8)}, dense


def exl2(widths: tuple[int, ...]) -> Maker:
    """Groups of 32 inputs, the first as wide as `widths` says first, and so on in turns; inputs in an order of the matrix's own."""

    def make(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
        groups = k // 32
        bits = [widths[g % len(widths)] for g in range(groups)]
        codes = [codes_of(rng, n, 32, 2**b) for b in bits]
        nibbles, most = torch.randint(0, 16, (groups, n), generator=rng), scales_of(rng, groups) * 20
        scales = (nibbles + 1).float() ** 2 / 256 * most.float()[:, None]
        row_of = torch.randperm(k, generator=torch.Generator().manual_seed(k))  # the same for q, k and v, as in real files
        room = -n % 32
        words = [torch.nn.functional.pad(stream(c, b).T, (0, room)) for c, b in zip(codes, bits, strict=True)]  # b rows each
        starts = [sum(bits[:g]) for g in range(groups)]
        tensors = {
            "q_weight": torch.cat(words),
            "q_groups": torch.tensor([number for pair in zip(bits, starts, strict=True) for number in pair], dtype=torch.int16),
            "q_scale": stream(torch.nn.functional.pad(nibbles, (0, room)), 4),
            "q_scale_max": most,
            "q_invperm": row_of.int(),
        }
        in_rows = torch.cat([(c - 2 ** (b - 1)) * s[:, None] for c, b, s in zip(codes, bits, scales, strict=True)], 1)
        return tensors, in_rows[:, row_of]

    return make


def bitnet(*, divide: bool) -> Maker:
    def make(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
        values, scale = codes_of(rng, n, k, 3) - 1, scales_of(rng, 1).float() * 20
        quarters = (values + 1).byte().view(4, n // 4, k)
        packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
        return {"weight": packed, "weight_scale": 1 / scale if divide else scale}, values * (1 / (1 / scale) if divide else scale)

    return make


def aqlm(rng: torch.Generator, n: int, k: int) -> tuple[Tensors, torch.Tensor]:
    """Two codebooks of whole numbers, whose first vectors reach 127 and stand first in each 32 inputs: int8 holds all of it exactly."""
    books = torch.randint(-50, 51, (2, 256, 1, 8), generator=rng).float()
    books[0, 0, 0, 3], books[1, 0, 0, 3] = 77, 50
    codes, scales = torch.randint(0, 256, (n, k // 8, 2), generator=rng), scales_of(rng, n, 1, 1, 1)
    codes[:, ::4] = 0
    sums = books[0, codes[..., 0], 0] + books[1, codes[..., 1], 0]  # [N, K / 8, 8]
    signed = torch.where(codes < 128, codes, codes - 256).to(torch.int8)
    return {"codes": signed, "codebooks": books.half(), "scales": scales}, sums.reshape(n, k) * scales.float().view(n, 1)


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
FLOAT8 = {"num_bits": 8, "type": "float"}
FP4 = {"num_bits": 4, "type": "float"}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}}
QUARK_INT4 = {"weight": {"dtype": "uint4", "qscheme": "per_group", "group_size": GROUP}}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": False}

FORMATS: dict[str, Format] = {
    "gptq": Format(GPTQ, gptq(4, minus_one=True)),
    "gptq, 3 bits, act-order": Format(
        {**GPTQ, "bits": 3, "desc_act": True, "checkpoint_format": "gptq_v2"}, gptq(3, minus_one=False, act_order=True)
    ),
    "gptq, 8 bits": Format({**GPTQ, "bits": 8}, gptq(8, minus_one=True)),
    "awq": Format(AWQ, awq_gemm),
    "awq gemv": Format({**AWQ, "version": "gemv"}, awq_gemv),
    "compressed-tensors int4": Format(compressed("pack-quantized", **INT4), ct_packed(4, symmetric=True)),
    "compressed-tensors int4 asymmetric": Format(compressed("pack-quantized", **INT4, symmetric=False), ct_packed(4, symmetric=False)),
    "compressed-tensors w8a8": Format(compressed("int-quantized", num_bits=8, strategy="channel"), int8_rows("weight", "weight_scale")),
    "compressed-tensors fp8": Format(compressed("float-quantized", **FLOAT8, strategy="channel"), fp8(None, rows=True)),
    "compressed-tensors nvfp4": Format(
        compressed("nvfp4-pack-quantized", **FP4, strategy="tensor_group", group_size=16),
        nvfp4("weight_packed", "weight_global_scale", divide=True),
    ),
    "compressed-tensors mxfp4": Format(compressed("mxfp4-pack-quantized", **FP4, strategy="group", group_size=32), mxfp4("weight_packed")),
    "compressed-tensors mxfp8": Format(compressed("mxfp8-quantized", **FLOAT8, strategy="group", group_size=32), mxfp8),
    "fp8": Format({"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8(None)),
    "fp8 blocks": Format({"quant_method": "fp8", "weight_block_size": [48, 48]}, fp8((48, 48), scale="weight_scale_inv")),
    "fbgemm_fp8": Format({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8(None, rows=True)),
    "aqlm": Format({"quant_method": "aqlm", "in_group_size": 8, "num_codebooks": 2, "nbits_per_codebook": 8}, aqlm),
    "bitnet": Format({"quant_method": "bitnet", "linear_class": "bitlinear"}, bitnet(divide=True)),
    "bitnet autobitlinear": Format({"quant_method": "bitnet", "linear_class": "autobitlinear"}, bitnet(divide=False)),
    "exl2, 2 to 4 bits": Format({"quant_method": "exl2", "bits": 3.0}, exl2((4, 3, 2))),
    "exl2, 2 to 8 bits": Format({"quant_method": "exl2", "bits": 4.7}, exl2((8, 6, 5, 4, 3, 2))),
    "bitsandbytes nf4": Format({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, bnb_nf4),
    "hqq": Format(HQQ, hqq(1)),
    "hqq axis 0": Format(HQQ, hqq(0)),
    "modelopt fp8": Format({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8(None)),
    "modelopt fp8 blocks": Format({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, fp8((128, 128), rank=4)),
    "modelopt nvfp4": Format({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4("weight", "weight_scale_2", divide=False)),
    "modelopt mxfp8": Format({"quant_method": "modelopt", "quant_algo": "MXFP8"}, mxfp8),
    "quark uint4": Format({"quant_method": "quark", "global_quant_config": QUARK_INT4, "export": {"pack_method": "reorder"}}, quark_int4),
    "quark mxfp4": Format({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp4"}}}, mxfp4("weight")),
    "quark fp8": Format({"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}}}, fp8(None)),
    "torchao int8": Format({"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}, torchao_int8),
    "auto-round gptq": Format({**AUTO_ROUND, "packing_format": "auto_round:auto_gptq"}, gptq(4, minus_one=True)),
    "auto-round": Format({**AUTO_ROUND, "packing_format": "auto_round"}, gptq(4, minus_one=False)),
    "auto-round awq": Format({**AUTO_ROUND, "packing_format": "auto_round:auto_awq"}, awq_gemm),
}
