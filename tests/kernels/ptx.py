"""Evaluates the little PTX that `minfer/kernels/triton/codes.py` holds, by the PTX ISA's definition of each instruction.

No interpreter runs inline assembly and no GPU is needed to know what it computes: a register is an array of 32-bit integers here, one
entry for each word that is tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

Registers = dict[str, torch.Tensor]  # int64, 0 .. 2^32 - 1
_MASK = 0xFFFFFFFF


def evaluate(text: str, inputs: Sequence[torch.Tensor], outputs: int = 1) -> list[torch.Tensor]:
    """The values of $0 .. for those of $outputs ..; int64 [words] all of them."""
    registers: Registers = {f"${outputs + n}": value & _MASK for n, value in enumerate(inputs)}
    body = re.fullmatch(r"\{(.*)\}", text.strip(), re.DOTALL)
    assert body, text
    for line in filter(None, (part.strip() for part in body.group(1).split(";"))):
        if line.startswith(".reg .b32"):
            continue
        operation, _, operands = line.partition(" ")
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[source] if source in registers else torch.tensor(int(source, 0)) for source in sources]
        registers[target] = OPERATIONS[operation](*values) & _MASK
    return [registers[f"${n}"] for n in range(outputs)]


def _lop3(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Bit i of the result is that bit of the table which the bits i of a, b and c number: 0xf0, 0xcc, 0xaa are a, b and c."""
    result = torch.zeros_like(a | b | c)
    for number in range(8):
        if int(table) >> number & 1:
            terms = [value if number >> (2 - place) & 1 else ~value for place, value in enumerate((a, b, c))]
            result |= terms[0] & terms[1] & terms[2]
    return result


def _prmt(a: torch.Tensor, b: torch.Tensor, select: torch.Tensor) -> torch.Tensor:
    """Byte i of the result is the one that nibble i of `select` numbers: 0..3 of a, 4..7 of b; bit 3 would repeat its sign."""
    result = torch.zeros_like(a | b | select)
    for place in range(4):
        nibble = select >> (4 * place) & 15
        assert not (nibble & 8).any(), "signs are not repeated anywhere"
        bytes_of = torch.where(nibble < 4, a >> (8 * (nibble & 3)), b >> (8 * (nibble & 3))) & 0xFF
        result |= bytes_of << (8 * place)
    return result


def halves(register: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The 16-bit floats in the lower and the upper half, as float64."""
    return [(register >> shift & 0xFFFF).to(torch.uint16).view(dtype).double() for shift in (0, 16)]


def _in_pairs(dtype: torch.dtype, operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """What is exact in float32 is rounded once."""

    def paired(*operands: torch.Tensor) -> torch.Tensor:
        low, high = (operation(*values).float().to(dtype) for values in zip(*(halves(value, dtype) for value in operands), strict=True))
        low, high = torch.broadcast_tensors(low, high)
        bits = [half.contiguous().view(torch.uint16).long() for half in (low, high)]
        return bits[0] | bits[1] << 16

    return paired


OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, count: a << count,
    "shr.b32": lambda a, count: a >> count,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "fma.rn.bf16x2": _in_pairs(torch.bfloat16, lambda a, b, c: a * b + c),
    "add.rn.f16x2": _in_pairs(torch.float16, lambda a, b: a + b),
}
