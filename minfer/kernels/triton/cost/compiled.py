"""A launch, compiled for a GPU that isn't here, as the model reads it: what it occupies, and its code cut at its loops."""

from __future__ import annotations

from collections.abc import Sequence

from triton.compiler import CompiledKernel

from minfer.kernels.triton import machine_code
from minfer.kernels.triton.aot import report_of
from minfer.kernels.triton.cost.code import Instruction, read
from minfer.kernels.triton.cost.predict import Code

_WIDE = 8  # bytes: a loop without products counts as one that does the work when its loads are this wide


def code_of(kernel: CompiledKernel, target: str) -> Code:
    nvidia = target.startswith("cuda")
    report = report_of(kernel, target)
    if nvidia:
        lines = machine_code.sass_lines(machine_code.disassemble(kernel.asm["cubin"]))
    else:
        lines = machine_code.amd_lines(kernel.asm["amdgcn"])
    instructions = [read(text, nvidia) for text, _ in lines]
    before, loops, after = cut(instructions, machine_code.innermost_loops(lines))
    return Code(report["registers"], report["spills"], report["shared"], report["warps"], before, loops, after)


Cut = tuple[list[Instruction], list[list[Instruction]], list[Instruction]]


def cut(instructions: Sequence[Instruction], loops: Sequence[tuple[int, int]]) -> Cut:
    """What stands before the first loop that does work, those loops in order, and all the rest.

    A loop does work when it multiplies on the matrix units; where none does, when it loads widely. Loops that overlap without one
    being inside the other are one: compilers put a path that is seldom taken behind the loop's end and jump back from there.
    """
    merged: list[tuple[int, int]] = []
    for first, last in loops:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    bodies = {ends: instructions[ends[0] : ends[1] + 1] for ends in merged}
    working = [ends for ends in merged if any(i.pipe == "matrix" for i in bodies[ends])]
    working = working or [ends for ends in merged if any(i.pipe == "memory" and i.bytes >= _WIDE for i in bodies[ends])]
    if not working:
        return list(instructions), [], []
    inside = {n for first, last in working for n in range(first, last + 1)}
    start = working[0][0]
    after = [instruction for n, instruction in enumerate(instructions) if n > start and n not in inside]
    return list(instructions[:start]), [list(bodies[ends]) for ends in working], after
