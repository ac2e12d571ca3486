"""LoRA in plain torch: adapter by adapter, in float32."""

from __future__ import annotations

from itertools import pairwise

import torch

from minfer.batch import LoraRows
from minfer.kernels.lora import LoraWeights


def lora(y: torch.Tensor, x: torch.Tensor, weights: LoraWeights, rows: LoraRows) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    rank = weights.rank
    for adapter, first, count in rows.groups:
        at = rows.rows[first : first + count].long()
        t = x[at].to(wide) @ weights.a[adapter - 1].to(wide).T  # [n, parts * R]
        for part, (begin, end) in enumerate(pairwise(weights.columns)):
            change = t[:, part * rank : (part + 1) * rank] @ weights.b[adapter - 1, :, begin:end].to(wide)
            change *= weights.scales[adapter - 1, part]
            y[at, begin:end] = (y[at, begin:end].to(wide) + change).to(y.dtype)
