"""Listings into instructions: NVIDIA's SASS, as cuobjdump prints it, and AMD's assembly, as the compiler does.

An instruction keeps what the model of a warp needs: the pipe it goes to, the registers it waits for and those it makes others wait for,
the bytes that a thread moves and the operations that a warp does. SASS doesn't document itself; which operand is written follows from the
order of operands (results first) and widths from the suffixes, which is right for what Triton makes and was read off its listings.

Pipes
    fma      float32 multiply and add, packed half ones; on AMD every vector instruction
    alu      integer, logic, comparison, selection, and conversions between floats
    special  exponentials, reciprocals, conversions of integers
    shared   shared memory, and shuffles between lanes, which take the same road
    memory   global memory
    matrix   matrix units
    other    what only takes its turn to issue: branches, barriers, uniform and scalar work
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    text: str
    pipe: str
    writes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    bytes: int = 0  # a lane moves
    operations: int = 0  # a warp does, on the matrix units
    legacy: bool = False  # a matrix instruction of the generation before
    asynchronous: bool = False  # a copy from global to shared memory that registers don't wait for
    commits: bool = False  # closes a group of such copies
    waits: dict[str, int] = field(default_factory=dict)  # what may still be outstanding: "copies", "memory", "shared", "matrix"
    barrier: bool = False
    store: bool = False


def read(text: str, nvidia: bool) -> Instruction:
    return _sass(text) if nvidia else _amd(text)


# ---------------------------------------------------------------- SASS

_FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"}
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "I2I"}
_HALF_FMA = {"IMAD"}
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _sass(text: str) -> Instruction:
    text = re.sub(r"^@!?U?P\w+\s+", "", text.strip())
    name, _, rest = text.partition(" ")
    base, *suffixes = name.split(".")
    operands = [part.strip() for part in rest.split(",")]
    if base in ("HMMA", "IMMA", "QMMA"):
        m, n, k = _mma_shape(suffixes[0])
        reads = (*_run(operands[1], 4), *_run(operands[2], 2), *_run(operands[3], 4))
        return Instruction(text, "matrix", _run(operands[0], 4), reads, operations=2 * m * n * k, legacy=True)
    if base in ("HGMMA", "IGMMA", "QGMMA"):
        m, n, k = (int(part) for part in suffixes[0].split("x"))
        from_registers = operands[1].startswith("R")
        reads = _run(operands[1], 4) if from_registers else ()
        # Four warps share it. B comes from shared memory, once for all of them, and A too where no register holds it.
        fed = (n * k + (0 if from_registers else m * k)) * (2 if base == "HGMMA" else 1) // (4 * 32)
        return Instruction(text, "matrix", _run(operands[0], n // 2), reads, bytes=fed, operations=2 * m * n * k // 4)
    if base in ("LDGDEPBAR", "DEPBAR", "WARPGROUP", "BAR", "WARPSYNC"):
        count = re.search(r"0x([0-9a-f]+)$", text)
        waits = {"copies": int(count.group(1), 16)} if base == "DEPBAR" and count and "SB0" in text else {}
        if base == "WARPGROUP" and "DEPBAR" in suffixes and count:
            waits = {"matrix": int(count.group(1), 16)}
        return Instruction(text, "other", waits=waits, commits=base == "LDGDEPBAR", barrier=base == "BAR")
    width = next((_WIDTH[suffix] for suffix in suffixes if suffix in _WIDTH), 4)
    if base == "LDSM" or base == "STSM":
        width = 4 * int(suffixes[-1]) if suffixes[-1].isdigit() else 4
    if base == "LDGSTS":
        return Instruction(text, "memory", (), _registers(rest), bytes=width, asynchronous=True)
    if base in ("LDG", "LD", "LDL"):
        return Instruction(text, "memory", _run(operands[0], max(1, width // 4)), _registers(",".join(operands[1:])), bytes=width)
    if base in ("STG", "ST", "STL", "RED", "ATOMG"):
        return Instruction(text, "memory", (), _registers(rest), bytes=width, store=True)
    if base in ("LDS", "LDSM"):
        return Instruction(text, "shared", _run(operands[0], max(1, width // 4)), _registers(",".join(operands[1:])), bytes=width)
    if base in ("STS", "STSM", "ATOMS"):
        return Instruction(text, "shared", (), _registers(rest), bytes=width, store=True)
    if base == "SHFL":
        return Instruction(text, "shared", _registers(operands[1]), _registers(",".join(operands[2:])), bytes=4)
    if base in ("BRA", "EXIT", "NOP", "BSSY", "BSYNC", "MEMBAR", "ERRBAR", "CCTL", "RET", "CALL", "PLOP3", "VOTE", "S2R", "CS2R"):
        return Instruction(text, "other", _registers(operands[0]) if base in ("S2R", "CS2R") else ())
    if base.startswith("U") or base in ("R2UR", "S2UR", "R2P"):
        return Instruction(text, "other", _registers(operands[0]), _registers(",".join(operands[1:])))
    written = 1 + sum(bool(re.fullmatch(r"U?P\w", operand)) for operand in operands[:2])
    written = min(written, max(1, len(operands) - 1), 2)
    results = _run(operands[0], 2 if "WIDE" in suffixes else 1) + _registers(",".join(operands[1:written]))
    reads = _registers(",".join(operands[written:]))
    pipe = "fma" if base in _FMA or base in _HALF_FMA else "special" if base in _SPECIAL else "alu"
    return Instruction(text, pipe, results, reads)


def half_rate(instruction: Instruction) -> bool:
    """Whether the pipe takes two turns for it: integer multiplication on NVIDIA's float pipe."""
    return instruction.text.startswith("IMAD")


def _mma_shape(digits: str) -> tuple[int, int, int]:
    """16816 is 16 x 8 x 16, 16832 is 16 x 8 x 32."""
    return int(digits[:2]), int(digits[2]), int(digits[3:])


def _run(operand: str, count: int) -> tuple[str, ...]:
    found = re.match(r"[-|~!]*(R|UR|P|UP)(\d+)", operand)
    return tuple(f"{found.group(1)}{int(found.group(2)) + n}" for n in range(count)) if found else ()


def _registers(text: str) -> tuple[str, ...]:
    found = []
    for kind, number, wide in re.findall(r"\b(UR|R|UP|P)(\d+)((?:\.\w+)*)", text):
        found += [f"{kind}{int(number) + n}" for n in range(2 if "64" in wide.split(".") else 1)]
    return tuple(found)


# ---------------------------------------------------------------- AMD

_AMD_BYTES = {"b8": 1, "u8": 1, "i8": 1, "b16": 2, "u16": 2, "i16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16}
_AMD_MEMORY = {
    "ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
}  # fmt: skip
_AMD_SPECIAL = ("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_", "v_sin_", "v_cos_")


def _amd(text: str) -> Instruction:
    name, _, rest = text.strip().partition(" ")
    operands = [part.strip() for part in rest.split(",")]
    if name == "s_waitcnt":
        kinds = {"vmcnt": "memory", "lgkmcnt": "shared"}
        return Instruction(text, "other", waits={kinds[kind]: int(n) for kind, n in re.findall(r"(vmcnt|lgkmcnt)\((\d+)\)", rest)})
    if name == "s_barrier":
        return Instruction(text, "other", barrier=True)
    if shape := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", name):
        m, n, k = (int(part) for part in shape.groups())
        reads = tuple(r for operand in operands[1:] for r in _amd_registers(operand))
        return Instruction(text, "matrix", _amd_registers(operands[0]), reads, operations=2 * m * n * k)
    if name.startswith("ds_"):
        width = next((_AMD_BYTES[part] for part in name.split("_") if part in _AMD_BYTES), 4) * (
            2 if "2_" in name or "2st64" in name else 1
        )
        store = name.startswith("ds_write")
        results = () if store else _amd_registers(operands[0])
        reads = tuple(r for operand in operands[0 if store else 1 :] for r in _amd_registers(operand.split(" ")[0]))
        return Instruction(text, "shared", results, reads, bytes=width, store=store)
    if memory := re.match(r"(?:global|buffer|flat)_(load|store|atomic)_(\w+?)(?:_d16|_d16_hi|_lds)*$", name):
        store = memory.group(1) != "load"
        results = () if store else _amd_registers(operands[0])
        reads = tuple(r for operand in operands[0 if store else 1 :] for r in _amd_registers(operand.split(" ")[0]))
        return Instruction(text, "memory", results, reads, bytes=_AMD_MEMORY.get(memory.group(2), 4), store=store)
    if name.startswith("s_load"):
        return Instruction(text, "memory", _amd_registers(operands[0]), (), bytes=0)
    if name.startswith("s_"):
        return Instruction(text, "other")
    reads = tuple(r for operand in operands[1:] for r in _amd_registers(operand))
    pipe = "special" if name.startswith(_AMD_SPECIAL) else "fma"
    return Instruction(text, pipe, _amd_registers(operands[0]), reads)


def _amd_registers(operand: str) -> tuple[str, ...]:
    found = re.match(r"[-|]*([vas])(?:(\d+)\b|\[(\d+):(\d+)\])", operand)
    if not found:
        return ()
    kind, single, first, last = found.groups()
    return (f"{kind}{single}",) if single else tuple(f"{kind}{n}" for n in range(int(first), int(last) + 1))
