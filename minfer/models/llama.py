"""Llama (Touvron 2023) and the families that share its shape: Llama 1-3.x, Mistral, Mixtral, Qwen2 and 3 with and without experts,
SmolLM2, TinyLlama.

    x = embed(tokens)
    for each layer:   x = x + attention(norm(x));   x = x + mlp(norm(x))
    logits = head(norm(x))

What differs between them (biases, sliding windows, tied head, rope scaling, norms of q and k, experts) is data in `ModelConfig`,
used by the shared layers; nothing here knows about devices, dtypes or quantisation. The residual stream is carried beside x, so that
each addition fuses with the norm that follows it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

from minfer.batch import Batch
from minfer.kernels import Ops
from minfer.kvcache import KVCache, LayerCache
from minfer.layers import Attention, Embedding, OutputHead, RMSNorm, feed_forward, rope_table
from minfer.model_config import ModelConfig

_M = TypeVar("_M", bound=nn.Module)

FINAL = -1  # in place of a number of layers: what the model hands to its head, after the last norm


class LlamaForCausalLM(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops, max_len: int, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.model = Llama(config, ops, max_len, device)
        tied = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head = OutputHead(ops, config.vocab_size, config.hidden_size, device=device, tied_to=tied)

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """The final hidden states of all tokens of the step, [T, H]."""
        return self.model(batch, cache, ())[0]  # type: ignore[no-any-return]

    def forward_states(self, batch: Batch, cache: KVCache, after: Sequence[int]) -> list[torch.Tensor]:
        """The final hidden states, and then the residual stream after each of these numbers of layers, or `FINAL`: [T, H] each.

        They are what the layers compute anyway, so asking for them costs the memory of holding them.
        """
        return self.model(batch, cache, after)  # type: ignore[no-any-return]

    def with_layers(self, keep: Sequence[int]) -> LlamaForCausalLM:
        """The model that has only these of the layers. All modules are this one's: nothing is copied."""
        shallow, inner = _twin(self), _twin(self.model)
        inner.layers = nn.ModuleList(self.model.layers[number] for number in keep)
        shallow.model = inner
        return shallow

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden[S, H] -> [S, V] float32."""
        return self.lm_head(hidden)  # type: ignore[no-any-return]


class Llama(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops, max_len: int, device: torch.device) -> None:
        super().__init__()
        rope = rope_table(config.rope, config.head_dim, max_len, device)
        self.embed_tokens = Embedding(ops, config.vocab_size, config.hidden_size, device=device)
        self.layers = nn.ModuleList(DecoderLayer(config, ops, n, rope, device) for n in range(config.num_layers))
        self.norm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, device=device)

    def forward(self, batch: Batch, cache: KVCache, after: Sequence[int]) -> list[torch.Tensor]:
        x, residual = self.embed_tokens(batch.token_ids), None
        states: dict[int, torch.Tensor] = {}
        for number, (layer, layer_cache) in enumerate(zip(self.layers, cache.layers, strict=True)):
            x, residual, stream = layer(x, residual, batch, layer_cache)
            if number in after:
                states[number] = stream
        states[FINAL], states[len(self.layers)] = self.norm(x, residual)
        return [states[FINAL], *(states[number] for number in after)]


def _twin(module: _M) -> _M:
    """A module with the same children, whose children can be exchanged."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops, layer: int, rope: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, device=device)
        self.self_attn = Attention(ops, config, layer, rope, device=device)
        self.post_attention_layernorm = RMSNorm(ops, config.hidden_size, config.rms_norm_eps, device=device)
        self._mlp = config.mlp_name(layer)
        self.add_module(self._mlp, feed_forward(ops, config, layer, device=device))

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, batch: Batch, cache: LayerCache
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x[T, H] and the residual stream it has yet to be added to; returns the same pair one layer on, and the sum as it came in."""
        mlp = getattr(self, self._mlp)
        x, stream = self.input_layernorm(x, residual, self.self_attn.reader)
        x = self.self_attn(x, batch, cache)
        x, residual = self.post_attention_layernorm(x, stream, mlp.reader)
        return mlp(x, batch.lora), residual, stream
