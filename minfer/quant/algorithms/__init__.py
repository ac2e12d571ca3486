"""Quantisation algorithms: they make a `PackedWeight` of a matrix, given what is known of its inputs.

    grid.py               the numbers a scheme can say, and rounding to the nearest of them
    scales.py             the scale and zero point of each group, by a search for the smallest error
    round_to_nearest.py   each weight by itself; needs no data
    gptq.py               errors made up for by later columns, with the products of the inputs
    equalize.py           AWQ and SmoothQuant: scales folded into the layer before

Who brings the data (minfer/quantize, layer by layer) stands above this room; writers/ says how the result lies in a file.
"""

from minfer.quant.algorithms.equalize import awq_scales, smoothquant_scales
from minfer.quant.algorithms.gptq import gptq
from minfer.quant.algorithms.round_to_nearest import round_to_nearest

__all__ = ["awq_scales", "gptq", "round_to_nearest", "smoothquant_scales"]
