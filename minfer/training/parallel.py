"""Medusa heads and the ReDrafter head as something to train: both guess from the model's final state of one token alone.

    Medusa (Cai et al., arXiv 2401.10774)      guess k = lm_heads[k](block_k(h)),   block(x) = x + silu(W x + b)
    ReDrafter (Cheng et al., arXiv 2403.09919)  s = silu(W e(token) + U s);  guess = lm_head(blocks(P [h, s])),  token by token

Heads begin as the model's own output head over the commonest tokens; Medusa's blocks begin as the identity, as published.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from minfer.training.eagle3 import shifted
from minfer.training.head import Ahead, Head, Target
from minfer.training.samples import Samples


class Medusa(Head):
    def __init__(self, target: Target, vocabulary: torch.Tensor, depth: int) -> None:
        super().__init__(target, vocabulary, depth)
        h = target.config.hidden_size
        self.blocks = nn.ModuleList(_MedusaBlock(h) for _ in range(depth))
        self.lm_heads = nn.ModuleList(nn.Linear(h, len(vocabulary), bias=False) for _ in range(depth))
        with torch.no_grad():
            for head in self.lm_heads:
                head.weight.copy_(target.head[vocabulary])  # type: ignore[operator]

    def unroll(self, samples: Samples, depth: int) -> Iterator[Ahead]:
        for block, head in zip(self.blocks[:depth], self.lm_heads[:depth], strict=True):
            yield samples.final, nn.Sequential(block, head)


class _MedusaBlock(nn.Module):
    def __init__(self, h: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(h, h)])
        nn.init.zeros_(self.layers[0].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[0].bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.layers[0](x))


class ReDrafter(Head):
    def __init__(self, target: Target, vocabulary: torch.Tensor, depth: int) -> None:
        super().__init__(target, vocabulary, depth)
        h = target.config.hidden_size
        self.input_proj = nn.Linear(2 * h, h)
        self.rnn_w = nn.Linear(h, h, bias=False)
        self.rnn_u = nn.Linear(h, h)
        self.lm_head = nn.Sequential(_ResBlock(h), nn.Linear(h, len(vocabulary), bias=False))
        with torch.no_grad():
            self.input_proj.weight[:, :h] = torch.eye(h)
            self.input_proj.bias.zero_()
            self.lm_head[1].weight.copy_(target.head[vocabulary])  # type: ignore[operator]

    def unroll(self, samples: Samples, depth: int) -> Iterator[Ahead]:
        embeddings = self.embed(samples.tokens)
        state = torch.zeros_like(samples.final)
        for step in range(depth):
            state = F.silu(self.rnn_w(shifted(embeddings, 1 + step)) + self.rnn_u(state))
            yield torch.cat((samples.final, state), -1), self._logits

    def _logits(self, both: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.input_proj(both))  # type: ignore[no-any-return]


class _ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.linear(x))
