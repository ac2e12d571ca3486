"""Quantised weights: `PackedWeight` is the type; readers of file formats and quantisation algorithms meet in it."""

from minfer.quant.packed import PackedWeight, QuantScheme

__all__ = ["PackedWeight", "QuantScheme"]
