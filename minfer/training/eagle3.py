"""The EAGLE-3 head as something to train (Li et al., arXiv 2503.01840): plain torch, float32, tensors under their published names.

One decoder layer that guesses the token after next from the next token and what the model thought: its residual stream after
a low, a middle and a high layer, fused by `fc`. Further guesses have no such thoughts to go on and take the layer's own output
instead; so it is trained as it will be used ("training-time test"), unrolled over its own outputs for a few steps:

    step j, column t:   embedding of token t + 1 + j,   fused states of token t (j = 0) or the output of step j - 1
                        sees the columns 0..t of step 0 and, of its own column, the steps 1..j
                        learns the model's distribution after token t + 1 + j

The layer begins as a copy of the model's last and the head as a copy of the model's, over the commonest tokens. `fc` begins near
zero: passed through, the highest states would say the token before the one that is asked for, loudly, and that is slow to unlearn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from minfer.layers import rope_table
from minfer.model_config import ModelConfig
from minfer.training.head import Ahead, Head, Target
from minfer.training.samples import Samples


class Eagle3(Head):
    staged = True

    def __init__(self, target: Target, vocabulary: torch.Tensor, depth: int) -> None:
        super().__init__(target, vocabulary, depth)
        config = target.config
        h, inner = config.hidden_size, config.intermediate_size
        self.fc = nn.Linear(3 * h, h, bias=False)
        self.midlayer = _Layer(config, h, inner)
        self.norm = nn.RMSNorm(h, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(h, len(vocabulary), bias=False)
        self._begin(target)

    @torch.no_grad()
    def _begin(self, target: Target) -> None:
        h = target.config.hidden_size
        self.fc.weight.normal_(0, 0.004)
        last = f"model.layers.{target.config.num_layers - 1}."
        for name, parameter in self.midlayer.named_parameters():
            if name == "hidden_norm.weight":
                parameter.copy_(target.read(last + "input_layernorm.weight"))
            elif name == "input_layernorm.weight":
                parameter.copy_(target.read("model.layers.0.input_layernorm.weight"))
            elif name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"):
                parameter[:, h:] = target.read(last + name)
                parameter[:, :h].normal_(0, 0.02)
            else:
                parameter.copy_(target.read(last + name))
        self.norm.weight.copy_(target.read("model.norm.weight"))
        self.lm_head.weight.copy_(target.head[self.vocabulary])

    def unroll(self, samples: Samples, depth: int) -> Iterator[Ahead]:
        size = samples.tokens.shape[1]
        table = rope_table(self.config.rope, self.config.head_dim, size + depth, torch.device("cpu"))
        embeddings = self.embed(samples.tokens)
        hidden = self.fc(samples.features).float()
        keys: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in range(depth):
            hidden = self.midlayer(shifted(embeddings, 1 + step), hidden, keys, table[step : step + size])
            yield hidden, self._logits

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(hidden))  # type: ignore[no-any-return]


class _Layer(nn.Module):
    def __init__(self, config: ModelConfig, h: int, inner: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(h, eps=config.rms_norm_eps)
        self.hidden_norm = nn.RMSNorm(h, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=config.rms_norm_eps)
        self.mlp = _Mlp(h, inner)

    def forward(
        self, embeddings: torch.Tensor, hidden: torch.Tensor, keys: list[tuple[torch.Tensor, torch.Tensor]], table: torch.Tensor
    ) -> torch.Tensor:
        x = torch.cat((self.input_layernorm(embeddings), self.hidden_norm(hidden)), -1)
        x = hidden + self.self_attn(x, keys, table)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, h: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(h, inner, bias=False), nn.Linear(h, inner, bias=False)
        self.down_proj = nn.Linear(inner, h, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_heads, config.num_kv_heads, config.head_dim
        inputs = 2 * config.hidden_size
        self.q_proj = nn.Linear(inputs, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(inputs, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(inputs, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, keys: list[tuple[torch.Tensor, torch.Tensor]], table: torch.Tensor) -> torch.Tensor:
        """x[B, S, 2H]; `keys` holds the keys and values of the steps before, and gets this one's."""
        q = rotated(self._heads(self.q_proj(x), self.heads), table)
        group = self.heads // self.kv_heads
        k = rotated(self._heads(self.k_proj(x), self.kv_heads), table).repeat_interleave(group, 1)
        v = self._heads(self.v_proj(x), self.kv_heads).repeat_interleave(group, 1)
        keys.append((k, v))
        if len(keys) == 1:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            out = self._chain(q, keys)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _chain(self, q: torch.Tensor, keys: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """q[B, Hq, S, D]: a column sees those up to its own of the first step, and its own of each later one."""
        size = q.shape[2]
        past = torch.ones(size, size, dtype=torch.bool).tril()
        scores = [(q @ keys[0][0].transpose(-1, -2)).masked_fill(~past, -math.inf)]
        scores += [(q * k).sum(-1, keepdim=True) for k, _ in keys[1:]]
        weights = (torch.cat(scores, -1) * self.dim**-0.5).softmax(-1)
        out = weights[..., :size] @ keys[0][1]
        for index, (_, v) in enumerate(keys[1:]):
            out = out + weights[..., size + index, None] * v
        return out  # type: ignore[no-any-return]

    def _heads(self, x: torch.Tensor, count: int) -> torch.Tensor:
        return x.unflatten(-1, (count, self.dim)).transpose(1, 2)  # type: ignore[no-any-return]


def rotated(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x[B, heads, S, D] by the angles of table[S, D]: cosines | sines."""
    cos, sin = table.chunk(2, -1)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def shifted(x: torch.Tensor, count: int) -> torch.Tensor:
    """x[B, S, ...] moved `count` columns to the left, zeros behind."""
    return torch.cat((x[:, count:], torch.zeros_like(x[:, :count])), 1)
