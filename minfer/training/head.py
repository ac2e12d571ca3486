"""What all drafting heads have in common while they are trained: the target's parts, the loss, and how often a guess was right.

A head learns the model's own distribution over the head's vocabulary (cross-entropy with soft labels), not the one token that
was drawn: the labels cost a product with the model's output head, and say far more per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from minfer.config import ModelConfig
from minfer.loader import Checkpoint
from minfer.training.samples import Samples


@dataclass(frozen=True)
class Target:
    """The model that a head is made for, as far as training needs it."""

    config: ModelConfig
    checkpoint: Checkpoint
    embeddings: torch.Tensor  # [V, H]
    head: torch.Tensor  # [V, H]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Target:
        embeddings = checkpoint.read("model.embed_tokens.weight").float()
        head = embeddings if checkpoint.config.tie_word_embeddings else checkpoint.read("lm_head.weight").float()
        return cls(checkpoint.config, checkpoint, embeddings, head)

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name).float()


class Head(nn.Module):
    """`vocabulary` [Vd] holds the ids that the head can guess, ascending. `depth` is the number of tokens it learns to guess ahead."""

    def __init__(self, target: Target, vocabulary: torch.Tensor, depth: int) -> None:
        super().__init__()
        self.config = target.config
        self.depth = depth
        self.vocabulary = vocabulary
        self.target_rows = target.head[vocabulary]  # [Vd, H]
        self._embeddings = target.embeddings

    def loss(self, samples: Samples) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and which guesses were right: [depth, B, S] int8, 1 right, 0 wrong, -1 nothing to guess."""
        raise NotImplementedError

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self._embeddings)

    def step_loss(self, logits: torch.Tensor, wanted: torch.Tensor, samples: Samples, ahead: int) -> torch.Tensor:
        """Cross-entropy of logits[B, S, Vd], at column t about what follows token t + `ahead`, with wanted[B, S, Vd]."""
        size = samples.tokens.shape[1]
        if size <= ahead:
            return logits.sum() * 0
        said = samples.answer[:, ahead:] & samples.known[:, ahead:]
        scores = logits[:, : size - ahead][said].float().log_softmax(-1)
        return -(wanted[:, ahead:][said] * scores).sum(-1).mean() if len(scores) else logits.sum() * 0

    def rightness(self, logits: torch.Tensor, samples: Samples, ahead: int) -> torch.Tensor:
        """Whether the likeliest token at column t is the one that came: token t + 1 + `ahead`. [B, S] int8."""
        out = torch.full(samples.tokens.shape, -1, dtype=torch.int8)
        size = samples.tokens.shape[1]
        last = size - 1 - ahead
        if last > 0:
            guess = self.vocabulary[logits[:, :last].argmax(-1)]
            counts = samples.answer[:, ahead + 1 :] & samples.known[:, ahead + 1 :]
            out[:, :last] = torch.where(counts, (guess == samples.tokens[:, ahead + 1 :]).to(torch.int8), -1)
        return out


def distribution(final: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """What the model would say next, over the ids that `rows` [Vd, H] of its head stand for."""
    return F.linear(final, rows).float().softmax(-1)
