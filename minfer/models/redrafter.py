"""ReDrafter's head (Cheng et al., arXiv 2403.09919): a recurrent cell over the tokens since a state of the target.

    s = silu(W embed(token) + U s + b);   logits = output(blocks(P [h, s] + b)),   block: x = x + silu(A x + b)

h is the target's final state and stays; s has seen the tokens after it. Names are those of Apple's checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from minfer.kernels import Ops
from minfer.layers import Linear, OutputHead


class ReDrafterHead(nn.Module):
    def __init__(
        self, ops: Ops, hidden_size: int, exit_size: int, vocab_size: int, blocks: int, recurrent: bool, device: torch.device
    ) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.projected = exit_size != 2 * hidden_size
        if self.projected:
            self.input_proj = Linear(ops, 2 * hidden_size, exit_size, bias=True, device=device)
        if recurrent:
            self.rnn_w = Linear(ops, hidden_size, hidden_size, device=device)
            self.rnn_u = Linear(ops, hidden_size, hidden_size, bias=True, device=device)
        self.lm_head = nn.ModuleList(_Block(ops, exit_size, device) for _ in range(blocks))
        self.output = OutputHead(ops, vocab_size, exit_size, device=device, tied_to=None)

    def advance(self, embeddings: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """The cell's memory [R, H] after a token more, whose embedding is given, [R, H]."""
        return F.silu(self.rnn_w(embeddings) + self.rnn_u(memory)) if self.recurrent else embeddings + memory

    def forward(self, state: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """state[R, H], memory[R, H] -> logits[R, Vd] of the token after those that the memory has seen."""
        x = torch.cat((state, memory), -1)
        if self.projected:
            x = self.input_proj(x)
        for block in self.lm_head:
            x = block(x)
        return self.output(x)  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, ops: Ops, size: int, device: torch.device) -> None:
        super().__init__()
        self.linear = Linear(ops, size, size, bias=True, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.silu(self.linear(x))
