"""The quantised KV cache in registers: rows into codes when they are stored, codes into numbers when they are read.

`minfer/kvcache.py` has the formats, `kernels/reference/kv_quant.py` their definition; the same float32 operations in the same order are
done here, so the codes are the same to the bit.

    int8   a byte is a code.
    int4   two halves of a row share its bytes, and rows are rotated by a Hadamard matrix: butterflies between partners 1, 2, 4, ... apart.
    fp8    e4m3 or e5m2, rotated; the scale is the best of eight tried. A code is read by moving its bits to where a float has its own, on
           every target: sm_80 and CDNA2 have no instruction for it, and CDNA3's means another format with the same bits (`targets.py`).

Which of the eight is best depends on the last bit of eight sums, so those are the definition's: each is seven additions of one half of
the numbers to the other, and nothing is fused into a multiply-add (`enable_fp_fusion=False` where it is launched). The candidates come
one after the other, each leaves a scale and an error for a row, and the codes are made again from the scale that won.

Tried for the halves: `tl.split`, as the butterflies have it. Eight times, that gave layouts in which a thread holds a whole row, and spills
on every target; a reduction over an axis of two does the same addition wherever the numbers lie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.kvcache import KVFormat

PLAIN, INT8, INT4, E4M3, E5M2 = range(5)
_PLAIN, _INT8, _INT4, _E4M3, _E5M2 = (tl.constexpr(kind) for kind in (PLAIN, INT8, INT4, E4M3, E5M2))
_KINDS = {torch.int8: INT8, torch.uint8: INT4, torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def kind_of(form: KVFormat) -> int:
    return _KINDS.get(form.dtype, PLAIN)


def number_unit(kind: int) -> float:
    """What `kv_numbers` multiplies every code by."""
    return 2.0**-8 if kind == E4M3 else 1.0


def value_unit(kind: int, dtype: torch.dtype) -> float:
    """What the numbers of V are multiplied by before the second product, so that none is much larger than 1.

    A probability meets the scale before it is rounded to the activations' type. Of codes up to 127 that scale is
    small, and in float16 the two together would be subnormal; a bfloat16 has room.
    """
    if dtype != torch.float16:
        return 1.0
    return {INT8: 2.0**-7, INT4: 2.0**-3, E5M2: 2.0**-15}.get(kind, 1.0)


@triton.jit
def kv_numbers(stored, KIND: tl.constexpr, HIGH: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """What is stored -> numbers of DTYPE, without their scale, times `number_unit`. HIGH: the second half of a packed row."""
    if KIND == _PLAIN:
        number = stored.to(DTYPE)
    elif KIND == _INT8:
        number = stored.to(tl.int8, bitcast=True).to(DTYPE)
    elif KIND == _INT4:
        if PTX and tl.bfloat16 == DTYPE:
            number = _int4_as_bfloat16(stored, HIGH)
        else:
            number = (((stored >> (4 * HIGH)) & 15).to(tl.int16) - 8).to(DTYPE)
    elif PTX and tl.float32 != DTYPE:
        number = _ptx_float8(stored, KIND, DTYPE)
    else:
        number = _float8_as_float16(stored, KIND)
        if tl.bfloat16 == DTYPE:  # a float32 with so few bits of mantissa is cut off exactly
            number = (number.to(tl.float32).to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        else:
            number = number.to(DTYPE)
    return number


@triton.jit
def _float8_as_float16(stored, KIND: tl.constexpr):
    upper = stored.to(tl.int16) << 8
    if KIND == _E4M3:  # its exponent has a bias 8 lower than a float16's
        upper = (upper & -32768) | ((upper >> 1) & 0x3F80)
    return upper.to(tl.int16).to(tl.float16, bitcast=True)


# Four bytes in a register, two pairs of 16-bit floats out: `prmt` puts two bytes into the upper halves of two words, and sign and the rest
# are moved from there to a float's places. A bfloat16 is 2^120 (e4m3) or 2^112 too small then; all but `number_unit` is made up for.
def _float8_text(pair: str, down: int, mask: str, half: bool) -> str:
    moved = f"shr.b32 u, t, {down}; and.b32 u, u, {mask};"
    if half:
        return f"{moved} lop3.b32 {pair}, t, 0x80008000, u, 0xea;"
    return f"{moved} lop3.b32 t, t, 0x80008000, u, 0xea; fma.rn.bf16x2 {pair}, t, mend, zero;"


def _float8_asm(down: int, mask: str, half: bool) -> tl.constexpr:
    begin = "{ .reg .b32 t, u, mend, zero; mov.b32 mend, 0x77807780; mov.b32 zero, 0x80008000;"
    pairs = (
        f"prmt.b32 t, $2, 0, {bytes_of}; {_float8_text(pair, down, mask, half)}" for pair, bytes_of in (("$0", "0x1404"), ("$1", "0x3424"))
    )
    return tl.constexpr(f"{begin} {' '.join(pairs)} }}")


E4M3_AS_BFLOAT16, E4M3_AS_FLOAT16 = _float8_asm(4, "0x07f007f0", False), _float8_asm(1, "0x3f803f80", True)
E5M2_AS_BFLOAT16 = _float8_asm(3, "0x0fe00fe0", False)
E5M2_AS_FLOAT16 = tl.constexpr("{ prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424; }")


@triton.jit
def _ptx_float8(stored, KIND: tl.constexpr, DTYPE: tl.constexpr):
    if tl.float16 == DTYPE:
        half: tl.constexpr = E4M3_AS_FLOAT16 if KIND == _E4M3 else E5M2_AS_FLOAT16
        number = tl.inline_asm_elementwise(half, "=r,=r,r", [stored], dtype=tl.float16, is_pure=True, pack=4)
    else:
        wide: tl.constexpr = E4M3_AS_BFLOAT16 if KIND == _E4M3 else E5M2_AS_BFLOAT16
        number = tl.inline_asm_elementwise(wide, "=r,=r,r", [stored], dtype=tl.bfloat16, is_pure=True, pack=4)
    return number


# Four bytes in a register, two pairs of bfloat16 out: `prmt` spreads two bytes over the halves of a word, lop3's 0xEA is (a & b) | c, and
# one fused multiplication takes off 128 + 8. Left to itself the compiler takes a byte at a time.
@triton.jit
def _int4_as_bfloat16(stored, HIGH: tl.constexpr):
    SHIFT: tl.constexpr = 4 * HIGH
    asm: tl.constexpr = (
        "{ .reg .b32 t, u, one, less; mov.b32 one, 0x3f803f80; mov.b32 less, 0xc308c308; shr.b32 u, $2, $3;"
        " prmt.b32 t, u, 0, 0x4140; lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, t, one, less;"
        " prmt.b32 t, u, 0, 0x4342; lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $1, t, one, less; }"
    )
    return tl.inline_asm_elementwise(asm, "=r,=r,r,r,r,r,r", [stored, SHIFT], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def row_scale(top, bad, factor, LIMIT: tl.constexpr):
    """The scale of a row from the magnitude that has to become LIMIT, times a factor: a bfloat16's number as float32. A row with a NaN has
    NaN, a subnormal scale is 0. Rounded by hand, to the even one of two: the interpreter's cast cuts off.
    """
    scale = tl.div_rn(top, tl.full(top.shape, LIMIT, tl.float32)) * factor
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    rounded = tl.where(tl.abs(scale) < 1.1754943508222875e-38, 0.0, bits.to(tl.float32, bitcast=True))
    return tl.where(bad, float("nan"), rounded)


@triton.jit
def quotients(x, scale):
    """x [R, W] over the scales [R]; 0 where the scale is."""
    wide = scale[:, None] + tl.zeros_like(x)
    return tl.where(wide == 0.0, 0.0, tl.div_rn(x, tl.where(wide == 0.0, 1.0, wide)))


@triton.jit
def nearest(x):
    """The whole number next to x, the even one of two; |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def kv_codes(x, KIND: tl.constexpr, LIMIT: tl.constexpr):
    """x in units of the scale -> bytes; of int4 -8..7 plus 8, not yet packed."""
    x = tl.where(x == x, x, 0.0)
    if KIND == _INT4:
        code = nearest(tl.minimum(tl.maximum(x, -LIMIT), LIMIT - 1)).to(tl.int32) + 8
    else:
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
        if KIND == _INT8:
            code = nearest(x).to(tl.int32) & 255
        elif KIND == _E4M3:
            code = _float8_code(x, 3, 7, 0.015625, 16384.0)
        else:
            code = _float8_code(x, 2, 15, 6.103515625e-05, 128.0)
    return code.to(tl.uint8)


@triton.jit
def _float8_code(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, NORMAL: tl.constexpr, MAGIC: tl.constexpr):
    """The nearest code of x, the even one of two. NORMAL: the smallest number that isn't subnormal. MAGIC: where a float32's last bit is a
    subnormal step, so that adding it rounds to whole steps and leaves their number in the low bits.
    """
    DROPPED: tl.constexpr = 23 - MANTISSA
    bits, size = x.to(tl.int32, bitcast=True), tl.abs(x)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)) >> DROPPED) - ((127 - BIAS) << MANTISSA)
    steps = (size + MAGIC).to(tl.int32, bitcast=True) & 0xFF
    return ((bits >> 24) & 0x80) | tl.where(size < NORMAL, steps, normal)


@triton.jit
def squared_error(x, scale, KIND: tl.constexpr, LIMIT: tl.constexpr, UNIT: tl.constexpr, STEPS: tl.constexpr):
    """Of rows x [R, 2^STEPS] under scales [R]: the upper half of the squares added to the lower until one is left. [R]"""
    number = kv_numbers(kv_codes(quotients(x, scale), KIND, LIMIT), KIND, 0, False, tl.float32)
    difference = number * (scale * (1.0 / UNIT))[:, None] - x
    squares = difference * difference
    for step in tl.static_range(STEPS):
        squares = tl.sum(tl.reshape(squares, [x.shape[0], 2, 1 << (STEPS - 1 - step)]), axis=1)
    return tl.reshape(squares, [x.shape[0]])


@triton.jit
def rotated(x, STEPS: tl.constexpr, FACTOR: tl.constexpr):
    """Rows x [R, WIDTH] times the Walsh-Hadamard matrix along runs of 2^STEPS. FACTOR: 2^(-STEPS / 2)."""
    for step in tl.static_range(STEPS):
        x = _butterfly(x, 1 << step, x.shape[0], x.shape[1])
    return x * FACTOR


@triton.jit
def _butterfly(x, SPAN: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr):
    pairs = tl.permute(tl.reshape(x, [R, WIDTH // (2 * SPAN), 2, SPAN]), [0, 1, 3, 2])
    first, second = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(first + second, first - second), [0, 1, 3, 2]), [R, WIDTH])
