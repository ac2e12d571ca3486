"""Recording a step: every op that a model asks for, once, as a list that C++ replays without Python.

While a `StepRecorder` is set on a runtime, ops are noted and nothing is computed. A step is recorded at its largest size and
replayed at any smaller one: of an op's arguments, only these belong to a particular batch, and become variables of the replay:

    rows, requests, ..._stride, ...       by their field's name
    token_ids, positions, slots, ...      the addresses of the batch's tensors, by value; null for one that a batch hasn't

Everything else is a constant: weights, caches, widths. Intermediate tensors get their addresses afterwards. The recording
knows from which op to which each is in use, so a planner packs them into one arena, where layers reuse the same few
megabytes and cache lines instead of meeting the allocator.

A step is recordable if it computes through ops and nothing else. A torch operation in between would run once, at
recording, and be missing from every replay; so any that isn't a view raises.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minfer.batch import Batch
from minfer.errors import ConfigError
from minfer.kernels.cpu.runtime import Kernel, Runtime

_SIZES = ("rows", "requests", "table_stride", "tail_stride", "lora_tiles")
_TENSORS = ("token_ids", "positions", "slots", "query_start", "seq_lens", "block_tables", "tails")
_LORA = ("rows", "tiles")  # of a batch whose rows have adapters
_ALIGNMENT = 64


@dataclass(slots=True)
class _Buffer:
    """A tensor that an op writes: where it was while recording, and the calls between which it is in use."""

    address: int
    size: int
    first: int = -1
    last: int = -1
    offset: int = 0  # in the arena


@dataclass(slots=True)
class _Call:
    kernel: Kernel
    values: list[int | float]
    inside: list[tuple[int, _Buffer, int]]  # (field, buffer, offset): pointers to be filled in
    variables: list[tuple[int, int]]  # (field, variable)


class StepRecorder:
    """Stands in for execution on one runtime. `batch` is the largest step; its tensors are never read."""

    def __init__(self, runtime: Runtime, batch: Batch) -> None:
        self.runtime = runtime
        if batch.tails is None:
            raise ConfigError("a step is recorded with a batch that has tails, so that every batch may have them")
        self._sizes = dict(zip(_SIZES, _sizes(batch), strict=True))
        self._inputs = {address: number for number, address in enumerate(_addresses(batch), len(_SIZES)) if address}
        self._buffers: list[_Buffer] = []
        self._calls: list[_Call] = []
        self._held: dict[int, torch.Tensor] = {}  # by address: weights, caches, tables

    def record(self, step: Callable[[], Sequence[torch.Tensor]]) -> CpuGraph:
        """Runs `step` with every op noted instead of computed. Raises ConfigError if it isn't recordable."""
        self.runtime.recorder = self
        try:
            with _OnlyViews():
                outputs = step()
        finally:
            self.runtime.recorder = None
        results = []
        for output in outputs:
            result = self._buffer_at(output.data_ptr())
            if result is None or result.address != output.data_ptr() or output.shape[0] != self._sizes["rows"]:
                raise ConfigError("a recorded step must return tensors that its ops computed, one row a token")
            result.last = len(self._calls)
            results.append((result, output.shape[1:], output.dtype))
        return CpuGraph(self.runtime, self._calls, self._plan(), results, list(self._held.values()))

    # what Kernel and Runtime call while a step is recorded

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype)  # never touched, so on a CPU it costs address space only
        self._buffers.append(_Buffer(tensor.data_ptr(), tensor.nbytes))
        return tensor

    def hold(self, tensor: torch.Tensor) -> None:
        address = tensor.data_ptr()
        if address not in self._held and self._buffer_at(address) is None:
            self._held[address] = tensor

    def call(self, kernel: Kernel, values: Sequence[int | float]) -> None:
        call = _Call(kernel, list(values), [], [])
        for field, ((kind, name), value) in enumerate(zip(kernel.fields, values, strict=True)):
            if name in _SIZES:
                if value != self._sizes[name]:
                    raise ConfigError(f"can't record {kernel.name}: its {name} are {value}, but the step has {self._sizes[name]}")
                call.variables.append((field, _SIZES.index(name)))
            elif kind == "ptr" and value in self._inputs:
                call.variables.append((field, self._inputs[int(value)]))
            elif kind == "ptr" and value not in self._held and (buffer := self._buffer_at(int(value))) is not None:
                call.inside.append((field, buffer, int(value) - buffer.address))
                buffer.first = len(self._calls) if buffer.first < 0 else buffer.first
                buffer.last = len(self._calls)
        self._calls.append(call)

    def _buffer_at(self, address: int) -> _Buffer | None:
        """The buffer an address lies in. The newest wins: tensors of the model die as it runs, and memory comes back."""
        return next((b for b in reversed(self._buffers) if b.address <= address < b.address + b.size), None)

    def _plan(self) -> int:
        """Gives every buffer the lowest offset that is free while it is in use; returns the arena's size."""
        placed: list[_Buffer] = []
        for buffer in sorted((b for b in self._buffers if b.first >= 0), key=lambda b: b.first):
            alive = sorted((b for b in placed if b.last >= buffer.first), key=lambda b: b.offset)
            offset = 0
            for other in alive:
                if offset + buffer.size <= other.offset:
                    break
                offset = max(offset, _aligned(other.offset + other.size))
            buffer.offset = offset
            placed.append(buffer)
        return max((_aligned(b.offset + b.size) for b in placed), default=0)


class CpuGraph:
    """A recorded step. `replay` computes it for a batch with one call into the library."""

    def __init__(
        self,
        runtime: Runtime,
        calls: Sequence[_Call],
        arena_size: int,
        outputs: Sequence[tuple[_Buffer, torch.Size, torch.dtype]],
        held: list[torch.Tensor],
    ) -> None:
        self.runtime = runtime
        self.num_calls = len(calls)
        self._held = held
        self._arena = torch.empty(arena_size + _ALIGNMENT, dtype=torch.uint8)
        base = _aligned(self._arena.data_ptr())
        library = runtime.library
        self._handle: int = library.minfer_graph_create()
        weakref.finalize(self, library.minfer_graph_destroy, self._handle)
        for call in calls:
            for field, buffer, offset in call.inside:
                call.values[field] = base + buffer.offset + offset
            library.minfer_graph_add(self._handle, call.kernel.handle, call.kernel.pack(call.values))
            for field, variable in call.variables:
                library.minfer_graph_bind(self._handle, 8 * field, variable)
        self._outputs = []
        for buffer, shape, dtype in outputs:
            begin = base - self._arena.data_ptr() + buffer.offset
            self._outputs.append(self._arena[begin : begin + buffer.size].view(dtype).view(-1, *shape))
        self._variables = (ctypes.c_int64 * (len(_SIZES) + len(_TENSORS) + len(_LORA)))()

    @property
    def arena_bytes(self) -> int:
        """Memory that all intermediate tensors share."""
        return self._arena.nbytes

    def replay(self, batch: Batch) -> list[torch.Tensor]:
        """The step's results for this batch, [T, ...] each, valid until the next replay."""
        rows = batch.num_tokens
        if rows > self._outputs[0].shape[0]:
            raise ConfigError(f"a step of {rows} tokens is larger than the {self._outputs[0].shape[0]} that were recorded")
        variables = self._variables
        for i, size in enumerate(_sizes(batch)):
            variables[i] = size
        for i, address in enumerate(_addresses(batch), len(_SIZES)):
            variables[i] = address
        self.runtime.library.minfer_graph_run(self._handle, ctypes.cast(variables, ctypes.c_char_p), self.runtime.pool)
        return [output[:rows] for output in self._outputs]


class _OnlyViews(TorchDispatchMode):
    """Raises at any torch operation that would compute something."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch's hook for being skipped imports its compiler, which takes seconds; nothing is compiled here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func not in (torch.ops.aten.empty.memory_format, torch.ops.aten._unsafe_view.default):
            raise ConfigError(f"can't record a step that runs the torch operation {func} between ops: its replay would lack it")
        return func(*args, **(kwargs or {}))


def _sizes(batch: Batch) -> list[int]:
    """What `_SIZES` are of this batch."""
    tail_stride = 0 if batch.tails is None else batch.tails.stride(0)
    tiles = 0 if batch.lora is None else batch.lora.tiles.shape[0]
    return [batch.num_tokens, batch.num_requests, batch.block_tables.stride(0), tail_stride, tiles]


def _addresses(batch: Batch) -> list[int]:
    """Of this batch's `_TENSORS` and `_LORA`; 0 where it hasn't one."""
    own = [getattr(batch, name) for name in _TENSORS]
    adapters = [None if batch.lora is None else getattr(batch.lora, name) for name in _LORA]
    return [0 if tensor is None else tensor.data_ptr() for tensor in (*own, *adapters)]


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
