"""The Triton backend: one set of kernels for CUDA and ROCm, and for any machine under Triton's interpreter.

One file a kernel, each with its wrapper, which checks what the kernel takes for granted. README.md says how they are tested where
there is no GPU. Importing this package needs the extra `triton`, and does no device work.

What isn't here yet is declined: a matrix that no kernel multiplies by is dequantised by the op table, which says so in the log.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.knobs

from minfer.batch import Batch
from minfer.config import Activations
from minfer.errors import ConfigError
from minfer.kernels.ops import Backend, Experts, StackedWeight, Weight
from minfer.kernels.triton.act_mul import act_mul
from minfer.kernels.triton.argmax import argmax
from minfer.kernels.triton.attention import attention
from minfer.kernels.triton.checks import FLOATS
from minfer.kernels.triton.forbid import forbid
from minfer.kernels.triton.linear_codes import TritonCodesWeight
from minfer.kernels.triton.linear_dense import TritonDenseWeight
from minfer.kernels.triton.linear_w8a8 import TritonRoundedWeight
from minfer.kernels.triton.logprobs import logprobs
from minfer.kernels.triton.lora import lora
from minfer.kernels.triton.moe import TritonExperts
from minfer.kernels.triton.rms_norm import rms_norm
from minfer.kernels.triton.rotary_kv import rotary_kv
from minfer.kernels.triton.sample import sample
from minfer.kernels.triton.targets import Target
from minfer.kernels.triton.tuning import Tuning
from minfer.kvcache import LayerCache
from minfer.quant import PackedWeight


class TritonBackend(Backend):
    """The kernels for one device.

    activations: which 8-bit matrices meet rows that are rounded to 8 bits too: those that were calibrated for it (auto), int8 ones with a
    scale a row as well (int8), or none. target: what kernels need to know of the device, where it isn't here to be asked. tuning: block
    shapes to use in place of the committed ones.
    """

    name = "triton"

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        target: Target | None = None,
        activations: Activations = "auto",
        tuning: Tuning | None = None,
    ) -> None:
        """Raises ConfigError for a device or type that the kernels can't run on."""
        if dtype not in FLOATS:
            raise ConfigError(f"backend triton computes in float32, bfloat16 or float16, not {dtype}")
        if device.type == "cpu" and not triton.knobs.runtime.interpret:
            raise ConfigError("backend triton needs a CUDA or ROCm device; on a CPU it runs under its interpreter only: TRITON_INTERPRET=1")
        if triton.knobs.runtime.interpret and dtype == torch.bfloat16:
            raise ConfigError("Triton's interpreter computes bfloat16 products wrongly; use --dtype float32 or float16 with it")
        self.device = device
        self.target = target or Target.of(device)
        self.activations = activations
        self.tuning = tuning or Tuning.of(self.target.architecture)

    rms_norm = staticmethod(rms_norm)
    rotary_kv = staticmethod(rotary_kv)
    act_mul = staticmethod(act_mul)
    argmax = staticmethod(argmax)
    lora = staticmethod(lora)
    sample = staticmethod(sample)
    logprobs = staticmethod(logprobs)
    forbid = staticmethod(forbid)

    def attention(
        self,
        q: torch.Tensor,
        cache: LayerCache,
        batch: Batch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        target = self.target
        return attention(
            q, cache, batch, scale, window, softcap, sinks, processors=target.processors, shared=target.shared, ptx=target.nvidia
        )

    def prepare(self, weight: torch.Tensor | PackedWeight, dtype: torch.dtype) -> Weight | str:
        if isinstance(weight, PackedWeight):
            if self._rounds_rows(weight) and TritonRoundedWeight.reason_against(weight, self.target) is None:
                return TritonRoundedWeight(weight, dtype, self.device, self.target, self.tuning)
            reason = TritonCodesWeight.reason_against(weight)
            return reason or TritonCodesWeight(weight, dtype, self.device, self.target, self.tuning)
        if weight.dtype != dtype:
            return f"a {weight.dtype} matrix can't multiply {dtype} activations; cast it first"
        return TritonDenseWeight(weight.to(self.device).contiguous())

    def _rounds_rows(self, weight: PackedWeight) -> bool:
        if self.activations == "none":
            return False
        return weight.scheme.activation != "none" or (self.activations == "int8" and weight.scheme.element == "int8")

    def stack(self, parts: Sequence[Weight]) -> Weight:
        dense = [part.tensor for part in parts if isinstance(part, TritonDenseWeight)]
        return TritonDenseWeight(torch.cat(dense)) if len(dense) == len(parts) else StackedWeight(parts)

    def experts(self, gate_up: Sequence[Weight], down: Sequence[Weight]) -> Experts | str:
        return TritonExperts.of(gate_up, down, self.tuning)
