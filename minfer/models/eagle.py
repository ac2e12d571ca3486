"""EAGLE heads: one decoder layer that guesses the token after next from the next token and the target's states.

    EAGLE-1, 2   x = fc [embed(token t + 1), state t];  layer without its first norm;  guess = target's head of the output
    EAGLE-3      h = fc [low, middle, high state t];  x = attention [norm embed(token t + 1), norm h];  guess = own head

The state is the target's where it has been computed, and the head's own last output behind that. What EAGLE-1 calls the state is
what the target's head sees (after the last norm); EAGLE-3's are streams between layers. (Li et al., arXiv 2401.15077, 2503.01840.)

EAGLE-3's layer computes through ops alone, where `norm_pair` is one, and so can be recorded.
"""

from __future__ import annotations

import torch
from torch import nn

from minfer.batch import Batch
from minfer.kernels import Ops
from minfer.kvcache import KVCache, LayerCache
from minfer.layers import Attention, Embedding, GatedMLP, Linear, OutputHead, RMSNorm, rope_table
from minfer.model_config import ModelConfig


class EagleHead(nn.Module):
    """EAGLE-1 and 2. `inputs_normed`: norms on embedding and state, as HASS and `speculators` train them.

    Where the checkpoint brings no embedding or output head, they are the target's, and whoever runs this one has them.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        max_len: int,
        device: torch.device,
        *,
        fc_bias: bool,
        inputs_normed: bool,
        own_embedding: bool,
        own_head: bool,
    ) -> None:
        super().__init__()
        h = config.hidden_size
        self.config = config
        if own_embedding:
            self.embed_tokens = Embedding(ops, config.vocab_size, h, device=device)
        if own_head:
            self.lm_head = OutputHead(ops, config.vocab_size, h, device=device, tied_to=None)
        self.fc = Linear(ops, 2 * h, h, bias=fc_bias, device=device)
        if inputs_normed:
            self.embedding_layernorm = RMSNorm(ops, h, config.rms_norm_eps, device=device)
            self.hidden_states_layernorm = RMSNorm(ops, h, config.rms_norm_eps, device=device)
        self.inputs_normed = inputs_normed
        rope = rope_table(config.rope, config.head_dim, max_len, device)
        self.midlayer = _PlainLayer(config, ops, rope, device)

    def states(self, states: torch.Tensor) -> torch.Tensor:
        """The target's states of some tokens, side by side, [T, F * H] -> what the layer takes for them, [T, H]."""
        return states

    def forward(self, batch: Batch, cache: KVCache, embeddings: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens' embeddings[T, H] and the state[T, H] before them -> what to guess from, and the state that stands for it later,
        [T, H] each.
        """
        if self.inputs_normed:
            embeddings, state = self.embedding_layernorm(embeddings, None)[0], self.hidden_states_layernorm(state, None)[0]
        x = self.midlayer(self.fc(torch.cat((embeddings, state), -1)), batch, cache.layers[0])
        return x, x


class Eagle3Head(nn.Module):
    """`norm_before_residual`: the residual stream is the normed state, as `speculators` trains it by default."""

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        max_len: int,
        device: torch.device,
        *,
        vocab_size: int,
        target_hidden_size: int,
        norm_before_residual: bool,
        fc_bias: bool,
        own_embedding: bool,
    ) -> None:
        super().__init__()
        h = config.hidden_size
        self.config = config
        if own_embedding:
            self.embed_tokens = Embedding(ops, config.vocab_size, h, device=device)
        self.fc = Linear(ops, 3 * target_hidden_size, h, bias=fc_bias, device=device)
        rope = rope_table(config.rope, config.head_dim, max_len, device)
        self.norm_before_residual = norm_before_residual
        self.midlayer = _FusingLayer(config, ops, rope, device)
        self.norm = RMSNorm(ops, h, config.rms_norm_eps, device=device)
        self.lm_head = OutputHead(ops, vocab_size, h, device=device, tied_to=None)

    def states(self, states: torch.Tensor) -> torch.Tensor:
        return self.fc(states)  # type: ignore[no-any-return]

    def forward(self, batch: Batch, cache: KVCache, embeddings: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `EagleHead.forward`."""
        both = self.midlayer.normed(embeddings, state)
        residual = both[:, state.shape[1] :] if self.norm_before_residual else state
        x, residual = self.midlayer(both, residual, batch, cache.layers[0])
        return self.norm(x, residual)  # type: ignore[no-any-return]


class _PlainLayer(nn.Module):
    """A Llama layer whose input is not normed, because `fc` made it to measure."""

    def __init__(self, config: ModelConfig, ops: Ops, rope: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        self.self_attn = Attention(ops, config, 0, rope, device=device)
        self.post_attention_layernorm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, device=device)
        self.mlp = GatedMLP(ops, config, device=device)

    def forward(self, x: torch.Tensor, batch: Batch, cache: LayerCache) -> torch.Tensor:
        x, residual = self.post_attention_layernorm(self.self_attn(x, batch, cache), x)
        return self.mlp(x, batch.lora) + residual  # type: ignore[no-any-return]


class _FusingLayer(nn.Module):
    """A Llama layer whose attention reads two hidden sizes: what comes next, and what the target thought before."""

    def __init__(self, config: ModelConfig, ops: Ops, rope: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        h = config.hidden_size
        self.ops = ops
        self.input_layernorm = RMSNorm(ops, h, config.rms_norm_eps, device=device)
        self.hidden_norm = RMSNorm(ops, h, config.rms_norm_eps, device=device)
        self.self_attn = Attention(ops, config, 0, rope, device=device, inputs=2 * h)
        self.post_attention_layernorm = RMSNorm(ops, h, config.rms_norm_eps, device=device)
        self.mlp = GatedMLP(ops, config, device=device)

    def normed(self, embeddings: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Side by side, [T, 2 H]."""
        first, second = self.input_layernorm, self.hidden_norm
        if self.ops.norm_pair is None:
            return torch.cat((first(embeddings, None)[0], second(state, None)[0]), -1)
        return self.ops.norm_pair(embeddings, first.weight, state, second.weight, first.eps)

    def forward(self, both: torch.Tensor, residual: torch.Tensor, batch: Batch, cache: LayerCache) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = self.post_attention_layernorm(self.self_attn(both, batch, cache), residual)
        return self.mlp(x, batch.lora), residual
