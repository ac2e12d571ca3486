"""From a checkpoint to a quantised checkpoint, layer by layer: `quantize_model` does it, a `Recipe` says how.

Above models/, because calibration runs the model's own layers; below the engine, which may want a model quantised before it loads it.
"""

from minfer.quantize.calibration import read_calibration
from minfer.quantize.model import LayerReport, quantize_model
from minfer.quantize.recipe import Recipe

__all__ = ["LayerReport", "Recipe", "quantize_model", "read_calibration"]
