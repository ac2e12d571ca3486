"""Finds and loads the compiled library, and declares its C functions: the only file that touches ctypes' loader.

A plain C ABI needs neither Python's nor torch's headers to build and survives upgrades of both. A call costs one or two
microseconds more than a native extension would; a recorded graph (`recorder.py`) makes one call a step, so it doesn't
matter there.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from pathlib import Path
from typing import Any

from minfer.errors import ConfigError, MinferError

FILE_NAME = "libminfer_cpu.so"
# Best first. avx512 is VNNI and BF16 (Sapphire Rapids, Zen 4, Cooper Lake), avx512vnni the same without BF16 (Cascade Lake, Ice
# Lake). A CPU with AVX-512 and neither (Skylake-X) runs avx2: without int8 dot products wider vectors gain little and lower its clock.
ISAS = ("avx512", "avx512vnni", "avx2", "portable")
_HANDLE, _TEXT, _INT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {  # result and arguments
    "minfer_has_isa": (_INT, [_TEXT]),
    "minfer_find_op": (_HANDLE, [_TEXT, _TEXT]),
    "minfer_op_args_size": (_INT, [_HANDLE]),
    "minfer_pool_create": (_HANDLE, [_INT]),
    "minfer_pool_destroy": (None, [_HANDLE]),
    "minfer_call": (None, [_HANDLE, _TEXT, _HANDLE]),
    "minfer_graph_create": (_HANDLE, []),
    "minfer_graph_destroy": (None, [_HANDLE]),
    "minfer_graph_add": (None, [_HANDLE, _HANDLE, _TEXT]),
    "minfer_graph_bind": (None, [_HANDLE, _INT, _INT]),
    "minfer_graph_run": (None, [_HANDLE, _TEXT, _HANDLE]),
}


class LibraryMissingError(MinferError):
    """The compiled kernels aren't there: no compiler at install time, or a source tree that wasn't built."""


def find() -> Path | None:
    """The library that MINFER_CPU_LIBRARY names (test builds), else the one beside this file (source tree, wheel), else the one
    in site-packages (editable install)."""
    if named := os.environ.get("MINFER_CPU_LIBRARY"):
        return Path(named)
    folders = [Path(__file__).parent]
    folders += [Path(sysconfig.get_path(kind)) / "minfer" / "kernels" / "cpu" for kind in ("platlib", "purelib")]
    return next((folder / FILE_NAME for folder in folders if (folder / FILE_NAME).exists()), None)


@functools.cache
def load() -> ctypes.CDLL:
    """The library with its functions declared. Raises LibraryMissingError."""
    path = find()
    if path is None:
        raise LibraryMissingError(
            "the compiled CPU kernels are not installed (no C++ compiler when minfer was installed?); install a compiler and "
            "reinstall minfer, or run `python -m minfer.kernels.cpu.build` in a source tree"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise LibraryMissingError(f"the compiled CPU kernels at {path} can't be loaded: {error}") from error
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def choose_isa(wanted: str | None = None) -> str:
    """`wanted`, else the environment's MINFER_CPU_ISA, else the best that this CPU runs. Raises ConfigError."""
    wanted = wanted or os.environ.get("MINFER_CPU_ISA") or None
    available = [isa for isa in ISAS if load().minfer_has_isa(isa.encode())]
    if wanted is None:
        return available[0]
    if wanted not in available:
        raise ConfigError(f"MINFER_CPU_ISA must be one that this CPU runs ({', '.join(available)}), not {wanted!r}")
    return wanted
