"""From a model's name to its weights: find it (`resolve_model`), open and check it (`open_checkpoint`), stream it (`Checkpoint.tensors`).

Nothing here knows what a model computes; it yields tensors under Hugging Face's names, whatever file they lie in.
"""

from minfer.loader.checkpoint import Checkpoint, CheckpointSummary, ModelSource, TensorInfo
from minfer.loader.open import open_checkpoint
from minfer.loader.quantize_on_load import quantized_as_asked
from minfer.loader.resolve import OfflineModel, list_offline_models, quantised_twin, resolve_model, resolve_tokenizer

__all__ = [
    "Checkpoint",
    "CheckpointSummary",
    "ModelSource",
    "OfflineModel",
    "TensorInfo",
    "list_offline_models",
    "open_checkpoint",
    "quantised_twin",
    "quantized_as_asked",
    "resolve_model",
    "resolve_tokenizer",
]
