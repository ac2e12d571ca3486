"""Captured steps: the model's Python runs once, and later steps replay what it asked for.

At decode sizes the Python around an op costs more than the op. A `Graph` removes it below the op table, so model code
stays as it is and eager mode remains for reading and debugging. On the CPU one recording serves every batch size up to the
largest, because its kernels decide at run time what depends on the size (`kernels/cpu/recorder.py`). A CUDA graph fixes addresses
and grids, so it needs static buffers and a capture for each of some sizes, and serves decode steps only, with drafts and without
(`runner/decode_graphs.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from minfer.batch import Batch, LoraRows
from minfer.errors import ConfigError
from minfer.kernels import Ops
from minfer.kernels.cpu import CpuBackend
from minfer.kernels.cpu.recorder import StepRecorder
from minfer.runner.lora_rows import TILE_ROWS, most_tiles

Step = Callable[[Batch], Sequence[torch.Tensor]]  # [T, ...] each


class Graph(Protocol):
    """A step that can be computed again for other batches."""

    def replay(self, batch: Batch) -> list[torch.Tensor]:
        """What the captured function returns for this batch, [T, ...] each. The memory is the graph's: valid until the next replay."""
        ...


@dataclass(frozen=True, slots=True)
class LoraGraphs:
    """A step with adapters and one without, so that who asks for none pays for none."""

    plain: Graph
    adapted: Graph

    def replay(self, batch: Batch) -> list[torch.Tensor]:
        return (self.plain if batch.lora is None else self.adapted).replay(batch)


def can_capture_on_gpu(ops: Ops) -> bool:
    """Whether every op is one that a CUDA graph can hold: none asks the device for anything while it is launched."""
    return all(how in ("triton", "flash_attn") or how.startswith("dequantised") for how in ops.chosen.values())


def can_capture(ops: Ops) -> bool:
    """Whether every op of the table, products included, was chosen from the one backend that can be recorded."""
    return all(how == CpuBackend.name or how.startswith("dequantised") for how in ops.chosen.values())


def capture_with_adapters(step: Step, ops: Ops, max_tokens: int, max_requests: int, adapters: int) -> Graph:
    """`capture` for a model with so many LoRA adapters, or none."""
    plain = capture(step, ops, max_tokens, max_requests)
    return LoraGraphs(plain, capture(step, ops, max_tokens, max_requests, adapters)) if adapters else plain


@torch.inference_mode()
def capture(step: Step, ops: Ops, max_tokens: int, max_requests: int, adapters: int = 0) -> Graph:
    """Captures `step` for batches up to these sizes, over block tables of any width. Computes nothing, writes no KV.

    With `adapters`, rows go through those of the model's LoRA adapters that the batch names.

    Raises ConfigError if the backends can't be recorded, or if `step` computes with torch beside its ops.
    """
    backend = next((b for b in ops.backends if isinstance(b, CpuBackend)), None)
    if backend is None or not can_capture(ops):
        chosen = ", ".join(f"{op}={name}" for op, name in ops.chosen.items())
        raise ConfigError(f"a step can be captured only when the cpu backend does every op, but the table is: {chosen}")
    batch = _largest_batch(max_tokens, max_requests, adapters)
    return StepRecorder(backend.runtime, batch).record(lambda: step(batch))


def _largest_batch(tokens: int, requests: int, adapters: int) -> Batch:
    """Shapes only: recording reads none of it. Every tensor has an address of its own, by which it is recognised."""

    def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    return Batch(
        token_ids=integers(tokens),
        positions=integers(tokens),
        slots=integers(tokens, dtype=torch.int64),
        query_start=integers(requests + 1),
        seq_lens=integers(requests),
        block_tables=integers(requests, 1),
        logits_at=integers(tokens, dtype=torch.int64),
        query_lens_host=[],
        seq_lens_host=[],
        tails=integers(requests, 1, dtype=torch.int64),
        lora=LoraRows(integers(tokens), integers(most_tiles(tokens, adapters), 3), [], TILE_ROWS) if adapters else None,
    )
