"""Writers of quantised checkpoints: `create_writer` finds the one for a format. One file a format, the reverse of readers/."""

from __future__ import annotations

from minfer.errors import ConfigError
from minfer.quant.writers.awq import AWQWriter
from minfer.quant.writers.base import Layout, MatrixWriter
from minfer.quant.writers.bitsandbytes import BitsAndBytesWriter
from minfer.quant.writers.compressed_tensors import CompressedTensorsWriter
from minfer.quant.writers.gptq import GPTQWriter

__all__ = ["FORMATS", "Layout", "MatrixWriter", "create_writer"]

FORMATS: dict[str, type[MatrixWriter]] = {
    writer.format: writer for writer in (AWQWriter, BitsAndBytesWriter, CompressedTensorsWriter, GPTQWriter)
}


def create_writer(form: str, layout: Layout) -> MatrixWriter:
    """Raises ConfigError for an unknown format, and for a layout that the format can't hold."""
    if form not in FORMATS:
        raise ConfigError(f"no checkpoint format is called {form!r}; known are {', '.join(FORMATS)}")
    return FORMATS[form](layout)
