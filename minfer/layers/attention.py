"""Grouped-query attention (Ainslie 2023) over the paged cache.

Notation: T new tokens of the step, Hq query heads, Hk KV heads, D head size. Query head h shares KV head h // (Hq / Hk).
"""

from __future__ import annotations

import torch
from torch import nn

from minfer.batch import Batch
from minfer.kernels import Ops, Rows, Weight
from minfer.kvcache import LayerCache
from minfer.layers.linear import Linear
from minfer.layers.norm import RMSNorm
from minfer.model_config import ModelConfig


class Attention(nn.Module):
    """`inputs`: the width of x where it isn't the hidden size."""

    def __init__(
        self, ops: Ops, config: ModelConfig, layer: int, rope: torch.Tensor, *, device: torch.device, inputs: int | None = None
    ) -> None:
        super().__init__()
        self.ops = ops
        self.heads, self.kv_heads, self.dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.scale = self.dim**-0.5
        self.window = config.window_of(layer)
        self.rope = rope  # [positions, D] float32, shared by all layers
        self.q_norm = RMSNorm(ops, self.dim, config.rms_norm_eps, device=device) if config.qk_norm else None
        self.k_norm = RMSNorm(ops, self.dim, config.rms_norm_eps, device=device) if config.qk_norm else None
        q, kv = self.heads * self.dim, self.kv_heads * self.dim
        parts = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        self.qkv_proj = Linear(ops, inputs or config.hidden_size, q + 2 * kv, bias=config.qkv_bias, parts=parts, device=device)
        self.o_proj = Linear(ops, q, config.hidden_size, bias=config.attention_output_bias, device=device)

    @property
    def reader(self) -> Weight | None:
        return self.qkv_proj.reader

    def forward(self, x: Rows, batch: Batch, cache: LayerCache) -> torch.Tensor:
        tokens = x.shape[0]
        qkv = self.qkv_proj(x, batch.lora).view(tokens, self.heads + 2 * self.kv_heads, self.dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)  # [T, Hq | Hk | Hk, D], views
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        self.ops.rotary_kv(q, k, v, batch.positions, self.rope, cache, batch.slots, norms)
        out = self.ops.attention(q, cache, batch, self.scale, self.window)  # [T, Hq, D]
        return self.o_proj(out.view(tokens, self.heads * self.dim), batch.lora)  # type: ignore[no-any-return]
