"""Medusa heads (Cai et al., arXiv 2401.10774): each guesses the token a fixed number of places ahead from one state of the target.

    guess k = lm_heads[k](block_k(h)),   block: x = x + silu(W x + b), a few times

They know nothing of each other's guesses, so all can be made at once, and the later ones are vague.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from minfer.kernels import Ops
from minfer.layers import Linear, OutputHead


class ResidualBlock(nn.Module):
    def __init__(self, ops: Ops, size: int, count: int, bias: bool, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(ops, size, size, bias=bias, device=device) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


class MedusaHeads(nn.Module):
    def __init__(self, ops: Ops, hidden_size: int, vocab_size: int, heads: int, blocks: int, bias: bool, device: torch.device) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(ops, hidden_size, blocks, bias, device) for _ in range(heads))
        self.lm_heads = nn.ModuleList(OutputHead(ops, vocab_size, hidden_size, device=device, tied_to=None) for _ in range(heads))

    def forward(self, head: int, state: torch.Tensor) -> torch.Tensor:
        """state[R, H], the target's final one -> logits[R, Vd] of the token `head` + 2 places after it."""
        return self.lm_heads[head](self.blocks[head](state))  # type: ignore[no-any-return]
