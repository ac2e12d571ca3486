"""`Recipe`: what `minfer quantize` was asked for, checked, and what follows from it: the scheme, the file format, the data needed.

method        bits, groups                    written as (auto)      needs data
rtn           2, 3, 4, 8                      compressed-tensors*    no
gptq          2, 3, 4, 8                      gptq                   products of inputs
awq           2, 3, 4, 8                      awq*                   products, magnitudes and some inputs
smoothquant   8, a row; inputs int8           compressed-tensors     largest magnitudes
fp8           8, a row; inputs fp8 by token   compressed-tensors     no
fp8-static    8, the matrix; inputs measured  compressed-tensors     largest magnitudes
nf4           4, 64                           bitsandbytes           no
mxfp4 mxfp6 mxfp8 nvfp4                       compressed-tensors     no

* 3 bits are written as gptq, 2 and 8 of awq as compressed-tensors
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from minfer.errors import ConfigError
from minfer.quant import QuantScheme
from minfer.quant.algorithms.gptq import Order
from minfer.quant.elements import Element
from minfer.quant.writers import FORMATS, Layout, MatrixWriter, create_writer

Method = Literal["rtn", "gptq", "awq", "smoothquant", "fp8", "fp8-static", "nf4", "mxfp4", "mxfp6", "mxfp8", "nvfp4"]
Need = Literal["products", "magnitudes", "probe"]
INTEGER_METHODS = ("rtn", "gptq", "awq")
_NEEDS: dict[str, frozenset[Need]] = {
    "gptq": frozenset({"products"}),
    "awq": frozenset({"products", "magnitudes", "probe"}),
    "smoothquant": frozenset({"magnitudes"}),
    "fp8-static": frozenset({"magnitudes"}),
}
_ELEMENTS: dict[int, Element] = {2: "int2", 3: "int3", 4: "int4", 8: "int8"}
_FIXED: dict[str, QuantScheme] = {
    "smoothquant": QuantScheme("int8", 0, True, "int8"),
    "fp8": QuantScheme("fp8_e4m3", 0, True, "fp8"),
    "fp8-static": QuantScheme("fp8_e4m3", 0, True, "fp8"),
    "nf4": QuantScheme("nf4", 64, True),
    "mxfp4": QuantScheme("fp4_e2m1", 32, True, scale_type="e8m0"),
    "mxfp6": QuantScheme("fp6_e2m3", 32, True, scale_type="e8m0"),
    "mxfp8": QuantScheme("fp8_e4m3", 32, True, scale_type="e8m0"),
    "nvfp4": QuantScheme("fp4_e2m1", 16, True, scale_type="e4m3"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """bits, group_size and symmetric belong to rtn, gptq and awq; the other methods have their own. group_size -1: one scale a row.

    symmetric None: the method's custom (awq has zero points, the others not). order and damping are GPTQ's, alpha SmoothQuant's.
    """

    method: Method = "gptq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool | None = None
    format: str = "auto"
    order: Order = "static"
    damping: float = 0.01
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(f"method must be one of {', '.join(get_args(Method))}, not {self.method!r}")
        if self.method in INTEGER_METHODS and self.bits not in _ELEMENTS:
            raise ConfigError(f"bits must be one of {', '.join(map(str, _ELEMENTS))}, not {self.bits}")
        if self.group_size != -1 and not 8 <= self.group_size <= 2**20:
            raise ConfigError(f"group_size must be -1 (one scale a row) or at least 8, not {self.group_size}")
        if self.order not in get_args(Order):
            raise ConfigError(f"order must be one of {', '.join(get_args(Order))}, not {self.order!r}")
        if not 0 < self.damping <= 1:
            raise ConfigError(f"damping must be above 0 and at most 1, not {self.damping}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha must be from 0 to 1, not {self.alpha}")
        if self.format not in ("auto", *FORMATS):
            raise ConfigError(f"format must be auto or one of {', '.join(FORMATS)}, not {self.format!r}")
        self.writer()  # refuses what the format can't hold

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be known of each layer's inputs; empty: nothing, so no calibration data is needed."""
        return _NEEDS.get(self.method, frozenset())

    @property
    def scheme(self) -> QuantScheme:
        """group_size 0 stands for a whole row."""
        if self.method in _FIXED:
            return _FIXED[self.method]
        symmetric = self.method != "awq" if self.symmetric is None else self.symmetric
        return QuantScheme(_ELEMENTS[self.bits], max(self.group_size, 0), symmetric)

    def scheme_of(self, k: int) -> QuantScheme:
        """For a matrix of `k` inputs."""
        scheme = self.scheme
        return scheme if scheme.group_size else dataclasses.replace(scheme, group_size=k)

    def writer(self) -> MatrixWriter:
        gptq = self.method == "gptq"
        layout = Layout(
            self.scheme,
            act_order=gptq and self.order == "group",
            static_order=gptq and self.order == "static",
            static_inputs=self.method == "fp8-static",
            per_tensor=self.method == "fp8-static",
        )
        return create_writer(self._format() if self.format == "auto" else self.format, layout)

    def _format(self) -> str:
        if self.method == "gptq" or (self.method in INTEGER_METHODS and self.bits == 3):
            return "gptq"
        if self.method == "awq":
            return "awq" if self.bits == 4 else "compressed-tensors"
        return "bitsandbytes" if self.method == "nf4" else "compressed-tensors"

    @property
    def label(self) -> str:
        """For people: "gptq, 4 bits, groups of 64"."""
        if self.method not in INTEGER_METHODS:
            return self.method
        size = "one scale a row" if self.group_size == -1 else f"groups of {self.group_size}"
        return f"{self.method}, {self.bits} bits, {size}, {'symmetric' if self.scheme.symmetric else 'with zero points'}"
