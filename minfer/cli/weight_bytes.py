"""How many bytes a checkpoint's weights take once loaded, from headers alone: what `minfer inspect` and `minfer fit` count with.

The compiled CPU kernels keep quantised matrices as dense as the file has them, so those count as they lie there; everything else
counts in the model's type. Two things are a little larger than said: 3- and 2-bit codes take four bits, 6-bit floats eight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from minfer.config import EngineConfig
    from minfer.loader import Checkpoint


def weight_bytes(checkpoint: Checkpoint, quant: str, dtype: torch.dtype, device: torch.device, config: EngineConfig) -> int:
    """Bytes of the weights as `--quant` runs them; those that stay as they are, in the model's type.

    The calibrated methods are counted as int4, the form that they end in (smoothquant: int8).
    """
    from minfer.loader.quantize_on_load import RECIPES, QuantizedOnLoad
    from minfer.quant.gguf import PACKED_TYPES

    method = {"awq": "int4", "gptq": "int4", "smoothquant": "int8"}.get(quant, quant)
    # What headers call a quantised matrix: GGUF its type, a safetensors folder's reader its settings.
    kept = {*PACKED_TYPES, method, checkpoint.quantization}
    if method in RECIPES and quant not in checkpoint.known_as():
        checkpoint = QuantizedOnLoad(checkpoint, method, None)
    packed = quant != "none" and config.backend != "reference" and device.type == "cpu"
    total = 0
    for info in checkpoint.tensor_infos.values():
        stays = packed and len(info.shape) == 2 and info.dtype in kept
        total += info.num_bytes if stays else math.prod(info.shape) * dtype.itemsize
    return total
