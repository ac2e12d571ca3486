"""A drafting head from its checkpoint to modules that run on the target's kernels, and the KV that it needs.

A head is made for one model: its widths and ids must be that model's, and are checked here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from minfer.errors import ConfigError
from minfer.kernels import Ops
from minfer.kvcache import KVCache
from minfer.layers.loading import load_weights
from minfer.loader.heads import HeadConfig, read_head
from minfer.model_config import ModelConfig
from minfer.models import FINAL
from minfer.models.eagle import Eagle3Head, EagleHead
from minfer.models.medusa import MedusaHeads
from minfer.models.redrafter import ReDrafterHead
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.algorithms import round_to_nearest

GROUP = 32


@dataclass(frozen=True)
class DraftHead:
    """`after`: the target's states that it reads. `token_ids` [Vd]: the ids that it guesses from, None for all of them."""

    config: HeadConfig
    module: EagleHead | Eagle3Head | MedusaHeads | ReDrafterHead
    after: tuple[int, ...]
    token_ids: torch.Tensor | None
    cache: KVCache | None = None

    @property
    def cached(self) -> ModelConfig | None:
        """The shape of what it keeps of each token."""
        return self.config.layer if self.config.kind in ("eagle", "eagle3") else None

    def with_cache(self, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> DraftHead:
        if self.cached is None:
            return self
        cache = KVCache(self.cached, blocks, block_size, dtype, device)
        for layer in cache.layers:  # a block whose pairs nobody brought in is read nevertheless: it must not hold a NaN
            for tensor in layer.tensors:
                tensor.view(torch.uint8).zero_()
        return dataclasses.replace(self, cache=cache)


def load_head(
    folder: Path,
    target: ModelConfig,
    ops: Ops,
    max_len: int,
    device: torch.device,
    after: tuple[int, ...] | None = None,
    *,
    rounded: bool = False,
) -> DraftHead:
    """`after` overrides what the checkpoint says. `rounded`: matrices become int8 with a scale for each 32 inputs, which makes drafts
    cheaper, and changes no output. Raises ModelLoadError, or ConfigError for a head of another model.
    """
    checkpoint = read_head(folder)
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    if config.target_hidden_size != target.hidden_size:
        raise ConfigError(
            f"draft_model {folder} is made for states of {config.target_hidden_size}, and the model's have {target.hidden_size}"
        )
    known = config.layer.vocab_size
    if known > target.vocab_size or (checkpoint.token_ids is None and config.vocab_size != target.vocab_size):
        raise ConfigError(f"draft_model {folder} has a vocabulary of {known} tokens and the model one of {target.vocab_size}")
    ids = None if checkpoint.token_ids is None else checkpoint.token_ids.to(device)
    module = _module(config, tensors, ops, max_len, device)
    load_weights(module, ((name, _rounded(tensor) if rounded else tensor) for name, tensor in tensors.items()))
    return DraftHead(config, module, _after(folder, config, target, after), ids)


def _rounded(tensor: torch.Tensor) -> torch.Tensor | PackedWeight:
    if tensor.dim() != 2 or tensor.shape[1] % GROUP:
        return tensor
    return round_to_nearest(tensor, QuantScheme("int8", GROUP, symmetric=True), search=False)


def _module(
    config: HeadConfig, tensors: dict[str, torch.Tensor], ops: Ops, max_len: int, device: torch.device
) -> EagleHead | Eagle3Head | MedusaHeads | ReDrafterHead:
    hidden, own = config.layer.hidden_size, "embed_tokens.weight" in tensors
    if config.kind == "eagle":
        own_head = "lm_head.weight" in tensors
        return EagleHead(
            config.layer, ops, max_len, device,
            fc_bias=config.fc_bias, inputs_normed=config.norm_inputs, own_embedding=own, own_head=own_head,
        )  # fmt: skip
    if config.kind == "eagle3":
        return Eagle3Head(
            config.layer, ops, max_len, device, vocab_size=config.vocab_size, target_hidden_size=config.target_hidden_size,
            norm_before_residual=config.norm_before_residual, fc_bias=config.fc_bias, own_embedding=own,
        )  # fmt: skip
    if config.kind == "medusa":
        return MedusaHeads(ops, hidden, config.vocab_size, config.num_heads, config.num_blocks, config.block_bias, device)
    return ReDrafterHead(ops, hidden, config.exit_size, config.vocab_size, config.num_blocks, config.recurrent, device)


def _after(folder: Path, config: HeadConfig, target: ModelConfig, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    if config.kind != "eagle3":
        if asked is not None:
            raise ConfigError(f"draft_states names layers for an EAGLE-3 head, but {folder} is of the kind {config.kind}")
        return (FINAL,)
    layers = target.num_layers
    after = asked or config.after or (2, layers // 2, layers - 3)
    if len(after) != 3 or not all(0 <= n <= layers for n in after):
        raise ConfigError(f"draft_model {folder} reads the states after the layers {list(after)}, but needs three of the model's {layers}")
    return after
