"""Runs one decoder layer of a model over calibration samples and watches what its matrices get as inputs.

The model's own code runs, with the reference kernels; only the matrices are wrapped (`ObservedWeight`), so there is no second
version of any model here, and a new family needs nothing. q, k and v are one product for the model and share their inputs,
gate and up likewise, so a layer has four sets of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from minfer.batch import Batch
from minfer.kernels import Ops, Weight
from minfer.kernels.reference import ReferenceBackend
from minfer.kernels.reference.linear import DenseWeight
from minfer.kvcache import LayerCache
from minfer.layers import rope_table
from minfer.layers.loading import load_weights
from minfer.model_config import ModelConfig
from minfer.models.llama import DecoderLayer
from minfer.quant import PackedWeight
from minfer.quantize.recipe import Need

PROBES = 512  # inputs kept as they are, spread over all samples


@dataclass
class InputStatistics:
    """Of the inputs [T, K] of one product: sum of x^T x, sum of |x|, largest |x|, and some rows."""

    products: torch.Tensor | None
    total_abs: torch.Tensor
    max_abs: torch.Tensor
    probe: list[torch.Tensor]
    probes_per_sample: int
    tokens: int = 0

    @classmethod
    def empty(cls, k: int, needs: frozenset[Need], samples: int) -> InputStatistics:
        per_sample = -(-PROBES // samples) if "probe" in needs else 0
        return cls(torch.zeros(k, k) if "products" in needs else None, torch.zeros(k), torch.zeros(k), [], per_sample)

    def add(self, x: torch.Tensor) -> None:
        magnitudes = x.abs()
        if self.products is not None:
            self.products.addmm_(x.T, x)
        self.total_abs += magnitudes.sum(0)
        self.max_abs = torch.maximum(self.max_abs, magnitudes.amax(0))
        if self.probes_per_sample:
            rows = torch.linspace(0, len(x) - 1, min(self.probes_per_sample, len(x))).long()
            self.probe.append(x[rows].clone())
        self.tokens += len(x)

    @property
    def mean_abs(self) -> torch.Tensor:
        return self.total_abs / max(self.tokens, 1)


class ObservedWeight(DenseWeight):
    statistics: InputStatistics | None = None

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.statistics is not None:
            self.statistics.add(x)
        return super().linear(x, bias)


class _ObservingBackend(ReferenceBackend):
    name = "observing reference"

    def prepare(self, weight: torch.Tensor | PackedWeight, dtype: torch.dtype) -> Weight | str:
        return "observes dense matrices" if isinstance(weight, PackedWeight) else ObservedWeight(weight)


# The products of a decoder layer, and the matrices that make up each.
PRODUCTS: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


class LayerRunner:
    """Decoder layers of one model over samples of one length, in float32. Holds one layer's KV cache and the rotary table."""

    def __init__(self, config: ModelConfig, seqlen: int) -> None:
        self.config = config
        self.device = torch.device("cpu")
        self.ops = Ops([_ObservingBackend()], torch.float32)
        self.rope = rope_table(config.rope, config.head_dim, seqlen, self.device)
        shape = (1, config.num_kv_heads, seqlen, config.head_dim)
        self.cache = LayerCache(torch.empty(shape), torch.empty(shape))
        self.batch = _one_sequence(seqlen)

    def layer(self, index: int, weights: Mapping[str, torch.Tensor]) -> DecoderLayer:
        """`weights` by their names inside the layer: "self_attn.q_proj.weight"."""
        layer = DecoderLayer(self.config, self.ops, index, self.rope, self.device)
        load_weights(layer, weights.items())
        return layer

    def run(self, layer: DecoderLayer, hidden: torch.Tensor) -> torch.Tensor:
        """hidden[T, H], the residual stream before the layer -> after it, [T, H]."""
        x, residual, _ = layer(hidden, None, self.batch, self.cache)
        return x.add_(residual)  # type: ignore[no-any-return]

    @staticmethod
    def observe(layer: DecoderLayer, needs: frozenset[Need], samples: int) -> dict[str, InputStatistics]:
        """From now on the layer's inputs are added up; by product."""
        found = {}
        for product in PRODUCTS:
            weight = layer.get_submodule(product).weight
            assert isinstance(weight, ObservedWeight), "prepared by the observing backend"
            weight.statistics = found[product] = InputStatistics.empty(weight.shape[1], needs, samples)
        return found


def _one_sequence(length: int) -> Batch:
    """A batch of one request that computes all of its tokens, in one block."""
    return Batch(
        token_ids=torch.zeros(length, dtype=torch.int32),
        positions=torch.arange(length, dtype=torch.int32),
        slots=torch.arange(length),
        query_start=torch.tensor([0, length], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        logits_at=torch.arange(length),
        query_lens_host=[length],
        seq_lens_host=[length],
    )
