"""AutoRound checkpoints (Cheng 2023, Intel): GPTQ's or AWQ's packing under settings of its own.

    packing_format auto_round:auto_gptq                zeros stored minus one, as GPTQ version 1
    packing_format auto_round, auto_round:gptqmodel    zeros stored as they are, as version 2
    packing_format auto_round:auto_awq                 AWQ's gemm layout
    packing_format auto_round:fp8...                   FP8 weights with a scale for the matrix or each row

`extra_config` gives layers, by name or regular expression, bits and group size of their own; 16 bits mean not quantised.
"""

from __future__ import annotations

from dataclasses import replace

from minfer.quant.readers.awq import awq_matrix
from minfer.quant.readers.base import Headers, MatrixReader, Settings, StoredMatrix, mapping, matches, refuse, text, whole
from minfer.quant.readers.floats import fp8_matrix, is_fp8
from minfer.quant.readers.gptq import gptq_layout, gptq_matrix

VERSIONS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}


class AutoRoundReader(MatrixReader):
    def __init__(self, settings: Settings) -> None:
        packing = text(settings, "packing_format", text(settings, "backend", "auto_round:auto_gptq"))
        fp8 = packing.startswith("auto_round:fp8")
        if packing not in VERSIONS and not fp8:
            refuse(f"AutoRound's packing_format {packing!r}", "export to auto_round:auto_gptq, auto_gptq, auto_awq or llm_compressor")
        self._version = VERSIONS.get(packing, "fp8")
        self._settings = settings
        self._extra = mapping(settings, "extra_config")
        bits = whole(settings, "bits", low=2, high=16)
        self.label = "AutoRound, FP8" if fp8 else f"AutoRound, {bits} bits"

    def matrix(self, name: str, shape: tuple[int, int], headers: Headers) -> StoredMatrix | None:
        if is_fp8(headers):
            return replace(fp8_matrix(shape, headers), unused=("input_scale", "act_scale"))
        if "qweight" not in headers:
            return None
        settings = {**self._settings, **self._extra_of(name)}
        if self._version != "awq":
            return gptq_matrix(gptq_layout(settings, self._version), shape, headers)
        if whole(settings, "bits") != 4:
            refuse(f"AWQ's packing with {settings['bits']} bits", "export to auto_round:auto_gptq")
        size = settings.get("group_size")
        return awq_matrix("gemm", None if size in (-1, None) else whole(settings, "group_size"), shape, headers)

    def _extra_of(self, name: str) -> Settings:
        for key in self._extra:
            if key == name or (not key.replace(".", "").isidentifier() and matches(key, name)):
                return mapping(self._extra, key)
        return {}
