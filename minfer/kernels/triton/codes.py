"""Codes of a quantised matrix into numbers, in registers: what the kernels of quantised products begin with.

Codes come in words of 16 bits, four or two in each; a kernel takes the PART-th of every word.

    int4     None is converted, they are placed into a float's mantissa:
                 (w >> 4 i) & 15 | 0x4300        128 + c_i  as a bfloat16, exactly: 7 bits of mantissa
                 (w >> 4 i) & 15 | 0x6400       1024 + c_i  as a float16
             The 128 (1024) too many are taken off outside of the product, times the sum of x: `tile_excess`, `number_excess`.
             On NVIDIA two words are done at once, in 32 bits, by PTX that says so: left to itself the compiler moves every half with a
             permutation of its own.
    table    a 4-bit index into 16 float32 values: nf4, fp4, whatever a file lists. A load that hits L1, all lanes in one line of it;
             a tree of selections would take fifteen instructions a weight.
    int8     converted: it doesn't fit a bfloat16's mantissa.
    e4m3     its bits moved to a float16's places are the number over 2^8, subnormals included; the 2^8 goes into the scales (`factor`).
    e5m2     the upper half of a float16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INT4, TABLE, INT8, E4M3, E5M2 = range(5)
KINDS = {"int4": INT4, "nf4": TABLE, "fp4_e2m1": TABLE, "table4": TABLE, "int8": INT8, "fp8_e4m3": E4M3, "fp8_e5m2": E5M2}  # by element
_INT4, _TABLE, _INT8, _E4M3 = (tl.constexpr(kind) for kind in (INT4, TABLE, INT8, E4M3))


def parts_of(kind: int) -> int:
    """Codes in a word."""
    return 4 if kind in (INT4, TABLE) else 2


def factor(kind: int) -> float:
    """By how much the kernels' numbers are too small."""
    return 256.0 if kind == E4M3 else 1.0


def tile_excess(kind: int, dtype: torch.dtype) -> int:
    """By how much `code_tile`'s numbers are too high in a product with activations of `dtype`."""
    return {torch.bfloat16: 128, torch.float16: 1024}.get(dtype, 0) if kind == INT4 else 0


def number_excess(kind: int, ptx: bool) -> int:
    """The same for `code_numbers`."""
    return 128 if kind == INT4 and ptx else 0


@triton.jit
def code_tile(words, table_ptr, PART: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """int16 words -> numbers of DTYPE, an operand of `tl.dot`."""
    if KIND == _INT4 and tl.bfloat16 == DTYPE:
        if PTX:
            number = _int4_as_bfloat16(words, PART)
        else:
            number = (((words >> (4 * PART)) & 15) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif KIND == _INT4 and tl.float16 == DTYPE:
        if PTX:
            number = _int4_as_float16(words, PART)
        else:
            number = (((words >> (4 * PART)) & 15) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        number = code_numbers(words, table_ptr, PART, KIND, PTX).to(DTYPE)
        if PTX and KIND == _INT4:
            number -= 128  # only float32 activations come here
    return number


@triton.jit
def code_numbers(words, table_ptr, PART: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr):
    """int16 words -> float32 numbers."""
    if KIND == _INT4:
        if PTX:
            number = _int4_as_float32(words, PART)
        else:
            number = ((words >> (4 * PART)) & 15).to(tl.float32)
    elif KIND == _TABLE:
        number = tl.load(table_ptr + ((words >> (4 * PART)) & 15))
    elif KIND == _E4M3 and PTX:
        number = _e4m3_as_float32(words, PART)
    else:
        upper = words << (8 * (1 - PART))  # the code in the upper byte, and anything below it
        if KIND == _INT8:
            number = (upper >> 8).to(tl.float32)
        elif KIND == _E4M3:
            number = ((upper & -32768) | ((upper >> 1) & 0x3F80)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            number = (upper & -256).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return number


@triton.jit
def widened(x, PTX: tl.constexpr):
    """x as float32. A bfloat16 is the upper half of one, and again the compiler would permute where a shift and a mask do."""
    if PTX and x.dtype == tl.bfloat16:
        asm: tl.constexpr = "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }"
        wide = tl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        wide = x.to(tl.float32)
    return wide


# A pair of words in a register, a pair of numbers out. lop3's 0xEA is (a & b) | c; the shift, a constant, comes once for each word.
@triton.jit
def _int4_as_bfloat16(words, PART: tl.constexpr):
    SHIFT: tl.constexpr = 4 * PART
    asm: tl.constexpr = "{ .reg .b32 t; shr.b32 t, $1, $2; lop3.b32 $0, t, 0x000f000f, 0x43004300, 0xea; }"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [words, SHIFT], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _int4_as_float16(words, PART: tl.constexpr):
    SHIFT: tl.constexpr = 4 * PART
    asm: tl.constexpr = "{ .reg .b32 t; shr.b32 t, $1, $2; lop3.b32 $0, t, 0x000f000f, 0x64006400, 0xea; }"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [words, SHIFT], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _int4_as_float32(words, PART: tl.constexpr):
    """128 + code as the upper half of a float32, which is that bfloat16's number."""
    SHIFT: tl.constexpr = 4 * PART
    asm: tl.constexpr = (
        "{ .reg .b32 t, u; shr.b32 t, $2, $3; shl.b32 u, t, 16;"
        " lop3.b32 $0, u, 0x000f0000, 0x43000000, 0xea; lop3.b32 $1, t, 0x000f0000, 0x43000000, 0xea; }"
    )
    return tl.inline_asm_elementwise(asm, "=r,=r,r,r,r", [words, SHIFT], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def _e4m3_as_float32(words, PART: tl.constexpr):
    SHIFT: tl.constexpr = 8 * (1 - PART)
    asm: tl.constexpr = (
        "{ .reg .b32 t, u; .reg .b16 low, high; shl.b32 t, $2, $3; shr.b32 u, t, 1; and.b32 u, u, 0x3f803f80;"
        " lop3.b32 t, t, 0x80008000, u, 0xea; mov.b32 {low, high}, t; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
    )
    return tl.inline_asm_elementwise(asm, "=r,=r,r,r,r", [words, SHIFT], dtype=tl.float32, is_pure=True, pack=2)
