"""What all drafting heads have in common while they are trained: the target's parts, the loss, and how often a guess was right.

A head learns the model's own distribution over the head's vocabulary (cross-entropy with soft labels), not the one token that
was drawn: the labels cost a product with the model's output head, and say far more per token. They are made once a batch for the tokens of
the answers, and guesses are made for these alone: prompts, padding and what nobody is asked about cost no output matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from minfer.loader import Checkpoint
from minfer.model_config import ModelConfig
from minfer.training.samples import Samples

Ahead = tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]  # what a guess is made from, [B, S, *], and what makes [.., Vd] of it


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

    staged = False  # whether guessing further ahead costs a pass of its own, so that training begins with what is near

    def __init__(self, target: Target, vocabulary: torch.Tensor, depth: int) -> None:
        super().__init__()
        self.config = target.config
        self.depth = depth
        self.vocabulary = vocabulary
        self.target_rows = target.head[vocabulary]  # [Vd, H]
        self._embeddings = target.embeddings

    def unroll(self, samples: Samples, depth: int) -> Iterator[Ahead]:
        """For 1, 2, ... `depth` tokens further ahead: what stands at column t is to say token t + 1 + that number."""
        raise NotImplementedError

    def loss(self, samples: Samples, depth: int) -> torch.Tensor:
        """The mean over the answers' tokens of the cross-entropies of guesses up to `depth`, nearer ones weighing more."""
        said = samples.answer & samples.known
        said[:, :depth] = False
        at = said.flatten().nonzero()[:, 0]
        if not len(at):
            return torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0
        with torch.no_grad():
            wanted = distribution(samples.final.flatten(0, 1)[at], self.target_rows)
        total = torch.zeros(())
        for ahead, (state, logits) in enumerate(self.unroll(samples, depth), 1):
            guess = logits(state.flatten(0, 1).index_select(0, at - ahead)).float()
            total = total + 0.8 ** (ahead - 1) * F.cross_entropy(guess, wanted)
        return total

    @torch.no_grad()
    def right(self, samples: Samples) -> torch.Tensor:
        """Which guesses were right: [depth, B, S] int8, 1 right, 0 wrong, -1 nothing to guess."""
        steps = enumerate(self.unroll(samples, self.depth), 1)
        return torch.stack([self.rightness(logits(state), samples, ahead) for ahead, (state, logits) in steps])

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.embedding(tokens, self._embeddings)

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
