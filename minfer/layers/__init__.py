"""The pieces models are made of: each holds its weights and makes one call into the op table."""

from minfer.layers.attention import Attention
from minfer.layers.embedding import Embedding, OutputHead
from minfer.layers.linear import Linear
from minfer.layers.mlp import GatedMLP
from minfer.layers.moe import MoE, feed_forward
from minfer.layers.norm import RMSNorm
from minfer.layers.rotary import rope_table

__all__ = ["Attention", "Embedding", "GatedMLP", "Linear", "MoE", "OutputHead", "RMSNorm", "feed_forward", "rope_table"]
