"""Quantisation algorithms: they make a `PackedWeight` of a matrix, given what is known of its inputs.

    grid.py               the numbers a scheme can say, and rounding to the nearest of them
    scales.py             the scale and zero point of each group, by a search for the smallest error
    round_to_nearest.py   each weight by itself; needs no data

Who brings the data (calibration, layer by layer) stands above this room; who writes the result to disk is in writers/.
"""

from minfer.quant.algorithms.round_to_nearest import round_to_nearest

__all__ = ["round_to_nearest"]
