"""One decoder layer's weights, quantised: which algorithm runs on which matrices, and what is folded where.

A layer's weights are a dictionary by their names inside the layer, float32. `equalize` changes them to an equal function that
rounds better; `quantize_layer` then packs each matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minfer.errors import ConfigError
from minfer.loader.check import is_router
from minfer.model_config import ModelConfig
from minfer.quant import PackedWeight
from minfer.quant.algorithms import awq_scales, gptq, round_to_nearest, smoothquant_scales
from minfer.quantize.observe import PRODUCTS, InputStatistics
from minfer.quantize.recipe import Recipe

Weights = dict[str, torch.Tensor]

# What makes a product's inputs: a norm, or the rows of the matrix before (for o_proj, v: attention mixes tokens, never channels).
_BEFORE = {
    "self_attn.qkv_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}
_SMOOTHED = ("self_attn.qkv_proj", "mlp.gate_up_proj")  # behind norms, where the outliers are


@dataclass(frozen=True)
class PackedMatrix:
    """`input_scale`: float32, one number, for formats that round inputs by a measured scale."""

    weight: PackedWeight
    input_scale: torch.Tensor | None = None


def equalize(weights: Weights, seen: dict[str, InputStatistics], recipe: Recipe, config: ModelConfig) -> None:
    """Folds AWQ's or SmoothQuant's scales into `weights`, and changes the statistics to those of the new inputs."""
    if recipe.method == "awq":
        for product in PRODUCTS:
            _apply(product, _awq(product, weights, seen[product], recipe, config), weights, seen, config)
    if recipe.method == "smoothquant":
        for product in _SMOOTHED:
            stacked = _stacked(product, weights)
            _apply(product, smoothquant_scales(stacked, seen[product].max_abs, recipe.alpha), weights, seen, config)


def _awq(product: str, weights: Weights, seen: InputStatistics, recipe: Recipe, config: ModelConfig) -> torch.Tensor:
    stacked = _stacked(product, weights)
    share = config.num_heads // config.num_kv_heads if product == "self_attn.o_proj" else 1
    scheme = recipe.scheme_of(stacked.shape[1])
    return awq_scales(stacked, torch.cat(seen.probe), seen.mean_abs, scheme, share, config.head_dim)


def _stacked(product: str, weights: Weights) -> torch.Tensor:
    return torch.cat([weights[f"{name}.weight"] for name in PRODUCTS[product]])


def _apply(product: str, scales: torch.Tensor, weights: Weights, seen: dict[str, InputStatistics], config: ModelConfig) -> None:
    """Multiplies the product's matrices by `scales` [K] and divides what makes their inputs."""
    for name in PRODUCTS[product]:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * scales
    before = _BEFORE[product]
    divisor = scales
    if product == "self_attn.o_proj":  # one row of v serves all query heads of its group
        share = config.num_heads // config.num_kv_heads
        divisor = scales.view(-1, share, config.head_dim)[:, 0].reshape(-1)
    wide = divisor[:, None] if weights[f"{before}.weight"].dim() == 2 else divisor
    weights[f"{before}.weight"] = weights[f"{before}.weight"] / wide
    if f"{before}.bias" in weights:
        weights[f"{before}.bias"] = weights[f"{before}.bias"] / divisor
    statistics = seen[product]
    if statistics.products is not None:
        statistics.products /= scales[:, None] * scales
    statistics.max_abs, statistics.total_abs = statistics.max_abs / scales, statistics.total_abs / scales
    statistics.probe = [rows / scales for rows in statistics.probe]


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor of a layer is one of those that are packed: its matrices, but for the routers of experts."""
    return len(shape) == 2 and not is_router(name)


def quantize_layer(weights: Weights, seen: dict[str, InputStatistics], recipe: Recipe, prefix: str) -> dict[str, PackedMatrix]:
    """By the matrix's name inside the layer ("mlp.up_proj"). `prefix` is the layer's own name, for what is wrong with its weights."""
    packed = {}
    for tensor, weight in weights.items():
        if not is_quantized(tensor, weight.shape):
            continue
        name = tensor.removesuffix(".weight")
        product = next((product for product, names in PRODUCTS.items() if name in names), None)
        try:
            packed[name] = _quantize(weight, seen.get(product) if product else None, recipe)
        except ConfigError as error:
            raise ConfigError(f"{prefix}{name}: {error}") from error
    return packed


def _quantize(weight: torch.Tensor, seen: InputStatistics | None, recipe: Recipe) -> PackedMatrix:
    scheme = recipe.scheme_of(weight.shape[1])
    if recipe.method == "gptq":
        assert seen is not None and seen.products is not None, "the recipe asked for them"
        return PackedMatrix(gptq(weight, seen.products, scheme, damping=recipe.damping, order=recipe.order))
    if recipe.method == "fp8-static":
        assert seen is not None, "the recipe asked for it"
        limit = torch.finfo(torch.float8_e4m3fn).max
        scale = (seen.max_abs.max() / limit).clamp(min=1e-12)
        return PackedMatrix(round_to_nearest(weight, scheme, per_tensor=True), scale)
    importance = None
    if recipe.method == "awq":
        assert seen is not None and seen.products is not None, "the recipe asked for them"
        importance = _group_products(seen.products, scheme.group_size)
    return PackedMatrix(round_to_nearest(weight, scheme, importance=importance))


def _group_products(products: torch.Tensor, size: int) -> torch.Tensor:
    """The blocks on the diagonal, [K / g, g, g]; of long groups only the diagonal, [K]: their blocks are the whole matrix."""
    if size > 256:
        return products.diagonal().clone()
    groups = products.shape[0] // size
    return products.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
