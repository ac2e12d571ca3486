"""What can be read from a compiled kernel: registers, spills, matrix instructions, widths of loads, the length of its loop.

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


Lines = list[tuple[str, int | None]]  # text of each instruction, and for one that jumps the number of the instruction it jumps to


def of_cubin(cubin: bytes) -> dict[str, Any]:
    usage, sass = disassemble(cubin, "-res-usage"), disassemble(cubin)
    registers, stack, local = (int(_only(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK", "LOCAL"))
    loads: Counter[int] = Counter()
    for modifiers in re.findall(r"\b(?:LDGSTS|LDG)\b((?:\.[\w]+)*)", sass):
        width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", modifiers)
        loads[{"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[width.group(1)] if width else 4] += 1
    matrix = {f"{kind}{rest}" for kind, rest in re.findall(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA)((?:\.[\w]+)*)", sass)}
    loop = _longest_loop(sass_lines(sass))
    return _report(registers, stack + local, matrix, loads, len(loop)) | {"permutes": sum("PRMT" in text for text in loop)}


def of_amdgcn(assembly: str) -> dict[str, Any]:
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    registers, vector_spills, scalar_spills = (int(_only(rf"\.{name}:\s+(\d+)", assembly)) for name in names)
    loads: Counter[int] = Counter()
    for width in re.findall(r"\b(?:global|buffer)_load_(\w+)", assembly):
        loads[_AMD_WIDTHS.get(width.removesuffix("_lds"), 4)] += 1
    matrix = set(re.findall(r"\bv_mfma_\w+", assembly))
    return _report(registers, 4 * (vector_spills + scalar_spills), matrix, loads, len(_longest_loop(amd_lines(assembly))))


_AMD_WIDTHS = {
    "ubyte": 1, "sbyte": 1, "ubyte_d16": 1, "ubyte_d16_hi": 1, "ushort": 2, "sshort": 2, "short_d16": 2, "short_d16_hi": 2,
    "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip


def sass_lines(sass: str) -> Lines:
    found = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;/]+);", sass)]
    number = {at: n for n, (at, _) in enumerate(found)}
    jumps = [re.search(r"\bBRA\b.*0x([0-9a-f]+)", text) for _, text in found]
    return [(text, number.get(int(jump.group(1), 16)) if jump else None) for (_, text), jump in zip(found, jumps, strict=True)]


def amd_lines(assembly: str) -> Lines:
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label.group(1)] = len(instructions)
        elif re.match(r"\s+[a-z]+_\w+", line):
            instructions.append(line.strip())
    jumps = [re.match(r"s_c?branch\w*\s+(\.LBB\w+)", text) for text in instructions]
    return [(text, labels.get(jump.group(1)) if jump else None) for text, jump in zip(instructions, jumps, strict=True)]


def innermost_loops(lines: Lines) -> list[tuple[int, int]]:
    """First and last line of each stretch that a jump backwards closes and that has no other inside, in order."""
    loops = [(to, at) for at, (_, to) in enumerate(lines) if to is not None and to < at]
    return sorted({(a, b) for a, b in loops if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)})


def _longest_loop(lines: Lines) -> list[str]:
    """Where a kernel spends its time; empty where nothing is repeated."""
    first, last = max(innermost_loops(lines), key=lambda ends: ends[1] - ends[0], default=(0, -1))
    return [text for text, _ in lines[first : last + 1]]


def _report(registers: int, spills: int, matrix: set[str], loads: Counter[int], loop: int) -> dict[str, Any]:
    """loads: bytes -> how many instructions load that much a thread. loop: instructions in the longest innermost loop."""
    return {
        "loop": loop,
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


def disassemble(cubin: bytes, what: str = "-sass") -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(_CUOBJDUMP), what, file.name], capture_output=True, text=True, check=True).stdout
