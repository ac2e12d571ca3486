"""Picks the reader for a `ModelSource`. Its own file so that the readers need not know each other."""

from __future__ import annotations

from minfer.loader.checkpoint import Checkpoint, ModelSource


def open_checkpoint(source: ModelSource) -> Checkpoint:
    """Reads and checks the headers, no weights yet; raises `ModelLoadError` if the checkpoint can't be used."""
    if source.kind == "gguf":
        from minfer.loader.gguf import GGUFCheckpoint

        return GGUFCheckpoint(source)
    if source.kind == "dummy":
        from minfer.loader.dummy import DummyCheckpoint

        return DummyCheckpoint(source)
    from minfer.loader.safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(source)
