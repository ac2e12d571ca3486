"""Running a step: the scheduler's decision becomes a `Batch`, the batch goes through the model."""

from minfer.runner.batch_builder import BatchBuilder, BatchRow, RowSpan
from minfer.runner.head_runner import HeadRunner
from minfer.runner.load import LoadedModel, load_model
from minfer.runner.load_head import DraftHead
from minfer.runner.model_runner import ModelRunner, Newest

__all__ = ["BatchBuilder", "BatchRow", "DraftHead", "HeadRunner", "LoadedModel", "ModelRunner", "Newest", "RowSpan", "load_model"]
