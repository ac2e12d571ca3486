"""NVIDIA ModelOpt checkpoints: FP8 in all its granularities, NVFP4, MXFP8.

The settings (`hf_quant_config.json`, or `quantization_config` with quant_method modelopt) name one algorithm, or MIXED_PRECISION
with one a layer. The tensors alone tell them apart, and are what decides here:

    weight e4m3, weight_scale float            FP8 (one), FP8_PER_CHANNEL_PER_TOKEN (a row), FP8_PB_WO (blocks, stored 4-D)
    weight e4m3, weight_scale uint8            MXFP8
    weight uint8 [N, K / 2], weight_scale e4m3, weight_scale_2 float32 (multiplied with)     NVFP4, W4A16_NVFP4

Left out: the AWQ and SmoothQuant variants, whose `pre_quant_scale` multiplies the layer's input.
"""

from __future__ import annotations

from dataclasses import replace

from minfer.quant.readers.base import FLOATS, Headers, MatrixReader, Settings, StoredMatrix, mapping, refuse, text
from minfer.quant.readers.floats import POWERS, fp8_matrix, is_fp8, mx_matrix, nvfp4_matrix

ALGORITHMS = (
    "fp8", "fp8_per_channel_per_token", "fp8_pb_wo", "fp8_pb_real", "nvfp4", "w4a16_nvfp4", "nvfp4_awq", "mxfp8", "mixed_precision",
)  # fmt: skip
UNUSED = ("input_scale",)


class ModelOptReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        settings = mapping(settings, "quantization") or settings
        algorithm = text(settings, "quant_algo", "unknown")
        if algorithm not in ALGORITHMS:
            refuse(f"ModelOpt's quant_algo {algorithm!r}", f"use a checkpoint in one of {', '.join(ALGORITHMS)}")
        self.label = f"ModelOpt, {algorithm}"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if "weight" not in headers or headers["weight"].dtype in FLOATS:
            return None
        if "pre_quant_scale" in headers:
            refuse("a ModelOpt checkpoint with pre_quant_scale (AWQ, SmoothQuant)", "use an FP8 or NVFP4 one without it")
        if not is_fp8(headers):
            names = {"weight": "weight", "scale": "weight_scale", "global_scale": "weight_scale_2"}
            stored = nvfp4_matrix(shape, headers, **names, divide=False)
        elif "weight_scale" in headers and headers["weight_scale"].dtype in POWERS:
            stored = mx_matrix("fp8_e4m3", shape, headers)
        else:
            in_blocks = "weight_scale" in headers and len(headers["weight_scale"].shape) == 4
            stored = fp8_matrix(shape, headers, block=(128, 128) if in_blocks else None)
        return replace(stored, unused=UNUSED)
