"""What can be read from a compiled kernel: registers, spills, matrix instructions, widths of loads.

NVIDIA: the cubin is disassembled by the cuobjdump that triton's wheel brings along; SASS is what runs (PTX is not: ptxas decides on
registers, fuses, and moves bytes about). AMD: the assembly of the compiler and the metadata at its end.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def of_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("-res-usage", file.name)
        sass = _run("-sass", file.name)
    registers, stack, local = (int(_only(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK", "LOCAL"))
    loads: Counter[int] = Counter()
    for modifiers in re.findall(r"\b(?:LDGSTS|LDG)\b((?:\.[\w]+)*)", sass):
        width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", modifiers)
        loads[{"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[width.group(1)] if width else 4] += 1
    matrix = {f"{kind}{rest}" for kind, rest in re.findall(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA)((?:\.[\w]+)*)", sass)}
    permutes = len(re.findall(r"\bPRMT\b", sass))
    return _report(registers, stack + local, matrix, loads) | {"permutes": permutes}


def of_amdgcn(assembly: str) -> dict[str, Any]:
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    registers, vector_spills, scalar_spills = (int(_only(rf"\.{name}:\s+(\d+)", assembly)) for name in names)
    loads: Counter[int] = Counter()
    for width in re.findall(r"\b(?:global|buffer)_load_(\w+)", assembly):
        loads[_AMD_WIDTHS.get(width.removesuffix("_lds"), 4)] += 1
    matrix = set(re.findall(r"\bv_mfma_\w+", assembly))
    return _report(registers, 4 * (vector_spills + scalar_spills), matrix, loads)


_AMD_WIDTHS = {
    "ubyte": 1, "sbyte": 1, "ubyte_d16": 1, "ubyte_d16_hi": 1, "ushort": 2, "sshort": 2, "short_d16": 2, "short_d16_hi": 2,
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip


def _report(registers: int, spills: int, matrix: set[str], loads: Counter[int]) -> dict[str, Any]:
    """loads: bytes -> how many instructions load that much a thread."""
    return {
        "registers": registers,
        "spills": spills,
        "matrix": sorted(matrix),
        "loads": {str(width): loads[width] for width in sorted(loads, reverse=True)},
    }


def _only(pattern: str, text: str) -> str:
    found = re.findall(pattern, text)
    if len(set(found)) != 1:
        raise ValueError(f"expected one {pattern!r} in the compiler's output, found {found}")
    return str(found[0])


def _run(*arguments: str) -> str:
    return subprocess.run([str(_CUOBJDUMP), *arguments], capture_output=True, text=True, check=True).stdout
