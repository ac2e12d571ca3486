"""`Runtime`: the thread pool, the instruction set, and how Python calls a compiled op or has it recorded.

Every op goes through `Kernel.__call__`, and every tensor that an op writes comes from `Runtime.empty`. That is what makes
a step recordable without the model knowing: while a `Recorder` is set, calls are noted instead of run.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch

from minfer.errors import ConfigError
from minfer.kernels.cpu import library
from minfer.kernels.cpu.threads import available_cores

# Must agree with DType in abi.h.
DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int8: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.float8_e4m3fn: 6,
    torch.float8_e5m2: 7,
    torch.uint8: 8,
}
_FORMATS = {"ptr": "q", "int": "q", "double": "d"}


class Recorder(Protocol):
    """What stands in for execution while a step is recorded."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...

    def hold(self, tensor: torch.Tensor) -> None: ...

    def call(self, kernel: Kernel, values: tuple[int | float, ...]) -> None: ...


class Kernel:
    """One compiled op: called with the fields of its argument struct, in order."""

    def __init__(self, runtime: Runtime, name: str, signature: str) -> None:
        self.name = name
        self.fields = [(kind, field) for kind, field in (part.split() for part in signature.split(","))]
        self.handle: int | None = runtime.library.minfer_find_op(runtime.isa.encode(), name.encode())
        if self.handle is None:
            raise ConfigError(f"the compiled CPU kernels have no op {name!r} for {runtime.isa}: they are older than the code, rebuild them")
        self._struct = struct.Struct("=" + "".join(_FORMATS[kind] for kind, _ in self.fields))
        expected = runtime.library.minfer_op_args_size(self.handle)
        if self._struct.size != expected:
            raise ConfigError(f"op {name!r} takes {expected} bytes of arguments, not {self._struct.size}: rebuild the CPU kernels")
        self._runtime = runtime
        self._call = runtime.library.minfer_call
        self._pool = runtime.pool

    def __call__(self, *values: int | float) -> None:
        recorder = self._runtime.recorder
        if recorder is None:
            self._call(self.handle, self._struct.pack(*values), self._pool)
        else:
            recorder.call(self, values)

    def pack(self, values: Sequence[int | float]) -> bytes:
        return self._struct.pack(*values)


class Runtime:
    """A pool of `threads` threads and the kernels of one instruction set. Engines don't share one."""

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self.library = library.load()
        self.isa = library.choose_isa(isa)
        self.threads = available_cores() if threads is None else threads
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        self.pool: int = self.library.minfer_pool_create(self.threads)
        weakref.finalize(self, self.library.minfer_pool_destroy, self.pool)
        self.recorder: Recorder | None = None

    def op(self, name: str, signature: str) -> Kernel:
        """Looks an op up. `signature` repeats the C struct: "ptr x, int rows, double eps"."""
        return Kernel(self, name, signature)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor for an op to write: its output, or scratch that Python sizes."""
        if self.recorder is None:
            return torch.empty(shape, dtype=dtype)
        return self.recorder.allocate(shape, dtype)

    def ptr(self, tensor: torch.Tensor | None) -> int:
        """The tensor's address (0 for None). A recording keeps alive what it points at."""
        if tensor is None:
            return 0
        if self.recorder is not None:
            self.recorder.hold(tensor)
        return tensor.data_ptr()
