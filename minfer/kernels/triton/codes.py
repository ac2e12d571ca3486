"""Codes of a quantised matrix into numbers, in registers: what the kernels of quantised products begin with.

Codes come in words of 16 bits, four or two in each; a kernel takes the PART-th of every word. Converting is what costs, so almost nothing
is converted: a code's bits are put where a float has its own, and one addition or multiplication does the rest.

    int4     (w >> 4 i) & 15 | 0x4300       128 + c as a bfloat16, exactly: 7 bits of mantissa; | 0x6400: 1024 + c as a float16.
             What is too much is taken off together with the zero point, exactly, by one addition (the lift); where those don't come in
             pairs (bfloat16 on CDNA), outside of the product, times the sum of x.
    int8     low 7 bits | 0x4300            128 + low as a bfloat16, and -128 or, where the code is negative, -256 to be added:
                                            that is the sign bit | 0xc300. | 0x6400 and 0xe400 for float16.
    e4m3, e5m2, e2m1                        sign and the rest at a float16's places: the number over 2^8, 1 or 2^14, subnormals included;
             at a bfloat16's, 2^112 times less, which one multiplication mends. The 2^8 and 2^14 go into the scales (`factor`).
    e4m3, CDNA3                             its matrix units' own kind of 8-bit floats has another bias: the same bits mean half as much. It
             converts two of them in one instruction, so there a code is taken for one of those (`E4M3_FNUZ`); -0, which is no number
             there, becomes 0 when the matrix is packed.
    table    a 4-bit index into 16 values (nf4, whatever a file lists). On NVIDIA the values are 32 bytes in 8 registers, and a permutation
             picks four bytes by four indices, all those of a word: 25 instructions for 8 weights (`table_bytes`). Elsewhere a load
             that hits L1, all lanes in one line of it; a tree of selections would take fifteen instructions a weight.

Elsewhere integers of 8 bits and small floats come as float32 numbers that a bfloat16 holds exactly: their upper halves are taken as they
are. Converting would round, in software on CDNA. In the loop at 16 rows and, of fp8, at 256, a turn on gfx942 takes: int8 251 -> 188
instructions, mxfp4 328 -> 264, fp8 463 -> 336, and -> 208 with the conversion that the hardware has.

What is no number (e4m3's S.1111.111, e5m2's highest exponent) would come out as one, 480 for instance: a checkpoint with such weights is
damaged, and refused where it is read, whatever it is read for (`StoredMatrix.read`).

On NVIDIA two words are done at once, in 32 bits, by PTX that says so: left to itself the compiler moves every half with a permutation of
its own. tests/kernels/test_triton_codes.py evaluates that text for every word there is; elsewhere plain Triton does the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INT4, TABLE, INT8, E4M3, E5M2, E2M1, E4M3_FNUZ = range(7)
KINDS = {"int4": INT4, "nf4": TABLE, "table4": TABLE, "fp4_e2m1": E2M1, "int8": INT8, "fp8_e4m3": E4M3, "fp8_e5m2": E5M2}  # by element
_INT4, _TABLE, _INT8, _E4M3, _E5M2, _E2M1, _E4M3_FNUZ = (tl.constexpr(kind) for kind in range(7))


def parts_of(kind: int) -> int:
    """Codes in a word."""
    return 4 if kind in (INT4, TABLE, E2M1) else 2


def factor(kind: int) -> float:
    """By how much the kernels' numbers are too small."""
    return {E4M3: 2.0**8, E2M1: 2.0**14, E4M3_FNUZ: 2.0}.get(kind, 1.0)


def placed_excess(dtype: torch.dtype) -> int:
    """By how much an int4 code is too high where it stands in a float of this type."""
    return {torch.bfloat16: 128, torch.float16: 1024}.get(dtype, 0)


def table_bytes(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values [16] -> int32 [8]: the lower bytes of them as 16-bit floats, four in a word, then the upper ones. What `code_tile` needs on
    NVIDIA."""
    pairs = values.to(dtype).view(torch.uint8).view(16, 2)
    return pairs.t().contiguous().view(torch.int32).view(8)


def number_excess(kind: int, ptx: bool) -> int:
    """By how much `code_numbers`' are too high."""
    return 128 if kind == INT4 and ptx else 0


@triton.jit
def code_tile(words, lift, table_ptr, PART: tl.constexpr, KIND: tl.constexpr, LIFTED: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """int16 words -> numbers of DTYPE, an operand of `tl.dot`. int4 codes are too high by `placed_excess`, or LIFTED as `lift` says."""
    half: tl.constexpr = tl.float16 == DTYPE
    if PTX and tl.float32 != DTYPE:
        if KIND == _INT4:
            number = _ptx_int4(words, lift, PART, half)
        elif KIND == _TABLE:
            number = _ptx_table(words, table_ptr, half)[PART]
        elif KIND == _INT8:
            number = _ptx_int8(words, PART, half)
        else:
            number = _ptx_float(words, PART, KIND, half)
    elif KIND == _INT4:
        if half:
            number = (((words >> (4 * PART)) & 15) | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
        elif tl.bfloat16 == DTYPE:
            number = (((words >> (4 * PART)) & 15) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            number = ((words >> (4 * PART)) & 15).to(tl.float32)
        if LIFTED:
            number += lift
    elif KIND != _TABLE and tl.bfloat16 == DTYPE:
        number = upper_half(code_numbers(words, table_ptr, PART, KIND, PTX))
    else:
        number = code_numbers(words, table_ptr, PART, KIND, PTX).to(DTYPE)
    return number


@triton.jit
def upper_half(x):
    """A float32 that a bfloat16 holds exactly, as one."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def code_numbers(words, table_ptr, PART: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr):
    """int16 words -> float32 numbers."""
    if KIND == _INT4:
        if PTX:
            SHIFT: tl.constexpr = 4 * PART
            number = tl.inline_asm_elementwise(
                INT4_AS_FLOAT32, "=r,=r,r,r,r", [words, SHIFT], dtype=tl.float32, is_pure=True, pack=2
            )  # fmt: skip
        else:
            number = ((words >> (4 * PART)) & 15).to(tl.float32)
    elif KIND == _TABLE:
        number = tl.load(table_ptr + ((words >> (4 * PART)) & 15))
    elif KIND == _INT8:
        number = ((words << (8 * (1 - PART))) >> 8).to(tl.float32)
    elif KIND == _E4M3_FNUZ:
        number = (words >> (8 * PART)).to(tl.uint8).to(tl.float8e4b8, bitcast=True).to(tl.float32)
    else:
        number = widened(_float16(words, PART, KIND, PTX), PTX)
    return number


@triton.jit
def _float16(words, PART: tl.constexpr, KIND: tl.constexpr, PTX: tl.constexpr):
    """The small float in the PART-th place, over `factor`, as a float16."""
    if PTX:
        number = _ptx_float(words, PART, KIND, True)
    elif KIND == _E5M2:
        number = ((words << (8 * (1 - PART))) & -256).to(tl.int16).to(tl.float16, bitcast=True)
    elif KIND == _E4M3:
        upper = words << (8 * (1 - PART))  # the code in the upper byte, and anything below it
        number = ((upper & -32768) | ((upper >> 1) & 0x3F80)).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        upper = words << (4 * (3 - PART))
        number = ((upper & -32768) | ((upper >> 3) & 0x0E00)).to(tl.int16).to(tl.float16, bitcast=True)
    return number


@triton.jit
def widened(x, PTX: tl.constexpr):
    """x as float32. A bfloat16 is the upper half of one, and again the compiler would permute where a shift and a mask do."""
    if PTX and x.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(BFLOAT16_AS_FLOAT32, "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def scaled(number, scale, PTX: tl.constexpr):
    """number * scale, both 16-bit, rounded to 16 bits: what a matrix that was dequantised beforehand holds."""
    if PTX and number.dtype == tl.bfloat16:
        product = tl.inline_asm_elementwise(SCALED_BFLOAT16, "=r,r,r", [number, scale], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        product = (number.to(tl.float32) * scale.to(tl.float32)).to(number.dtype)
    return product


# A pair of words in a register, a pair of numbers out; shifts are constants. lop3's 0xEA is (a & b) | c. sm_80 adds and multiplies pairs
# of bfloat16 only as a * b + c, so an addition is a multiplication by one (0x3f80), and a multiplication adds -0.
def _text(registers: str, *instructions: str) -> tl.constexpr:
    return tl.constexpr(f"{{ .reg .b32 {registers}; {' '.join(instruction + ';' for instruction in instructions)} }}")


BFLOAT16_AS_FLOAT32 = tl.constexpr("{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }")
SCALED_BFLOAT16 = _text("z", "mov.b32 z, 0x80008000", "fma.rn.bf16x2 $0, $1, $2, z")
INT4_AS_FLOAT32 = _text(  # 128 + code as the upper half of a float32, which is that bfloat16's number
    "t, u", "shr.b32 t, $2, $3", "shl.b32 u, t, 16",
    "lop3.b32 $0, u, 0x000f0000, 0x43000000, 0xea", "lop3.b32 $1, t, 0x000f0000, 0x43000000, 0xea",
)  # fmt: skip
INT4_AS_BFLOAT16 = _text(
    "t, one", "shr.b32 t, $1, $3", "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea",
    "mov.b32 one, 0x3f803f80", "fma.rn.bf16x2 $0, t, one, $2",
)  # fmt: skip
INT4_AS_FLOAT16 = _text("t", "shr.b32 t, $1, $3", "lop3.b32 t, t, 0x000f000f, 0x64006400, 0xea", "add.rn.f16x2 $0, t, $2")
INT8_AS_BFLOAT16 = _text(
    "t, low, lift, one", "shr.b32 t, $1, $2", "lop3.b32 low, t, 0x007f007f, 0x43004300, 0xea",
    "lop3.b32 lift, t, 0x00800080, 0xc300c300, 0xea", "mov.b32 one, 0x3f803f80", "fma.rn.bf16x2 $0, low, one, lift",
)  # fmt: skip
INT8_AS_FLOAT16 = _text(
    "t, low, lift", "shr.b32 t, $1, $2", "lop3.b32 low, t, 0x007f007f, 0x64006400, 0xea",
    "lop3.b32 lift, t, 0x00800080, 0xe400e400, 0xea", "add.rn.f16x2 $0, low, lift",
)  # fmt: skip


def _placed(down: int, mask: str, half: bool) -> tl.constexpr:
    """The word moved up until the code's sign is on top, the code's other bits moved down by so many, and joined with the sign."""
    moved = ("shl.b32 t, $1, $2", f"shr.b32 u, t, {down}", f"and.b32 u, u, {mask}")
    if half:
        return _text("t, u", *moved, "lop3.b32 $0, t, 0x80008000, u, 0xea")
    mend = ("mov.b32 m, 0x77807780", "mov.b32 z, 0x80008000", "fma.rn.bf16x2 $0, t, m, z")  # times 2^112
    return _text("t, u, m, z", *moved, "lop3.b32 t, t, 0x80008000, u, 0xea", *mend)


E4M3_AS_BFLOAT16, E4M3_AS_FLOAT16 = _placed(4, "0x07f007f0", False), _placed(1, "0x3f803f80", True)
E5M2_AS_BFLOAT16, E5M2_AS_FLOAT16 = _placed(3, "0x0fe00fe0", False), _text("t", "shl.b32 t, $1, $2", "and.b32 $0, t, 0xff00ff00")
E2M1_AS_BFLOAT16, E2M1_AS_FLOAT16 = _placed(6, "0x01c001c0", False), _placed(3, "0x0e000e00", True)


def _picked(word: str, select: str, half: str) -> tuple[str, ...]:
    """The lower and upper bytes of a word's four values, then its values side by side: 0 and 1, 2 and 3."""
    return (
        *(f"prmt.b32 {to}, {a}, {b}, {word}" for to, a, b in (("p", "$5", "$7"), ("q", "$9", "$11"))), f"prmt.b32 low, p, q, {select}",
        *(f"prmt.b32 {to}, {a}, {b}, {word}" for to, a, b in (("p", "$13", "$15"), ("q", "$17", "$19"))), f"prmt.b32 high, p, q, {select}",
        f"prmt.b32 {half}01, low, high, 0x5140", f"prmt.b32 {half}23, low, high, 0x7362",
    )  # fmt: skip


# An argument that is the same for both words of a pair comes in two registers: $5 and $6, $7 and $8, ...
TABLE_VALUES = _text(
    "w, s, p, q, low, high, a01, a23, b01, b23",
    "and.b32 w, $4, 0x77777777", "shr.b32 s, $4, 1", "lop3.b32 s, s, 0x44444444, 0x32103210, 0xea", *_picked("w", "s", "a"),
    "shr.b32 w, w, 16", "shr.b32 s, s, 16", *_picked("w", "s", "b"),
    "prmt.b32 $0, a01, b01, 0x5410", "prmt.b32 $1, a01, b01, 0x7632", "prmt.b32 $2, a23, b23, 0x5410", "prmt.b32 $3, a23, b23, 0x7632",
)  # fmt: skip
_TABLE_REGISTERS = tl.constexpr("=r,=r,=r,=r" + 17 * ",r")


@triton.jit
def _ptx_table(words, table_ptr, HALF: tl.constexpr):
    """All four parts at once: asked for each of them, it is computed once."""
    t0, t1, t2, t3 = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3)
    t4, t5, t6, t7 = tl.load(table_ptr + 4), tl.load(table_ptr + 5), tl.load(table_ptr + 6), tl.load(table_ptr + 7)
    operands = [words, t0, t1, t2, t3, t4, t5, t6, t7]
    if HALF:
        numbers = tl.inline_asm_elementwise(
            TABLE_VALUES, _TABLE_REGISTERS, operands, dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        numbers = tl.inline_asm_elementwise(
            TABLE_VALUES, _TABLE_REGISTERS, operands, dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    return numbers


@triton.jit
def _ptx_int4(words, lift, PART: tl.constexpr, HALF: tl.constexpr):
    SHIFT: tl.constexpr = 4 * PART
    if HALF:
        number = tl.inline_asm_elementwise(
            INT4_AS_FLOAT16, "=r,r,r,r,r", [words, lift, SHIFT], dtype=tl.float16, is_pure=True, pack=2
        )  # fmt: skip
    else:
        number = tl.inline_asm_elementwise(
            INT4_AS_BFLOAT16, "=r,r,r,r,r", [words, lift, SHIFT], dtype=tl.bfloat16, is_pure=True, pack=2
        )  # fmt: skip
    return number


@triton.jit
def _ptx_int8(words, PART: tl.constexpr, HALF: tl.constexpr):
    SHIFT: tl.constexpr = 8 * PART
    if HALF:
        number = tl.inline_asm_elementwise(INT8_AS_FLOAT16, "=r,r,r,r", [words, SHIFT], dtype=tl.float16, is_pure=True, pack=2)
    else:
        number = tl.inline_asm_elementwise(INT8_AS_BFLOAT16, "=r,r,r,r", [words, SHIFT], dtype=tl.bfloat16, is_pure=True, pack=2)
    return number


@triton.jit
def _ptx_float(words, PART: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr):
    SHIFT: tl.constexpr = 4 * (3 - PART) if KIND == _E2M1 else 8 * (1 - PART)
    if HALF:
        text: tl.constexpr = E4M3_AS_FLOAT16 if KIND == _E4M3 else E5M2_AS_FLOAT16 if KIND == _E5M2 else E2M1_AS_FLOAT16
        number = tl.inline_asm_elementwise(text, "=r,r,r,r", [words, SHIFT], dtype=tl.float16, is_pure=True, pack=2)
    else:
        wide: tl.constexpr = E4M3_AS_BFLOAT16 if KIND == _E4M3 else E5M2_AS_BFLOAT16 if KIND == _E5M2 else E2M1_AS_BFLOAT16
        number = tl.inline_asm_elementwise(wide, "=r,r,r,r", [words, SHIFT], dtype=tl.bfloat16, is_pure=True, pack=2)
    return number
