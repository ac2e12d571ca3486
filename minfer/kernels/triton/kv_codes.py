"""The quantised KV cache in registers: rows into codes when they are stored, codes into numbers when they are read.

`minfer/kvcache.py` has the formats, `kernels/reference/kv_quant.py` their definition; the same float32 operations in the same order are
done here, so the codes are the same to the bit.

    int8   a byte is a code.
    int4   two halves of a row share its bytes, and rows are rotated by a Hadamard matrix: butterflies between partners 1, 2, 4, ... apart.

Left out: fp8, whose scale is the best of eight tried. The error's sum by halves, as the definition has it, gave layouts in which a thread
holds a whole row, and spills on every target.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.kvcache import KVFormat

PLAIN, INT8, INT4 = range(3)
_PLAIN, _INT8, _INT4 = (tl.constexpr(kind) for kind in (PLAIN, INT8, INT4))
_KINDS = {torch.int8: INT8, torch.uint8: INT4}


def kind_of(form: KVFormat) -> int:
    return _KINDS.get(form.dtype, PLAIN)


def value_unit(kind: int, dtype: torch.dtype) -> float:
    """What the numbers of V are multiplied by before the second product, so that none is much larger than 1.

    A probability meets the scale before it is rounded to the activations' type. Of codes up to 127 that scale is
    small, and in float16 the two together would be subnormal; a bfloat16 has room.
    """
    if dtype != torch.float16:
        return 1.0
    return {INT8: 2.0**-7, INT4: 2.0**-3}.get(kind, 1.0)


@triton.jit
def kv_numbers(stored, KIND: tl.constexpr, HIGH: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """What is stored -> numbers of DTYPE, without their scale. HIGH: the second half of a packed row."""
    if KIND == _PLAIN:
        number = stored.to(DTYPE)
    elif PTX and KIND == _INT4 and tl.bfloat16 == DTYPE:
        number = _int4_as_bfloat16(stored, HIGH)
    elif KIND == _INT8:
        number = stored.to(tl.int8, bitcast=True).to(DTYPE)
    else:
        number = (((stored >> (4 * HIGH)) & 15).to(tl.int16) - 8).to(DTYPE)
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
def row_scale(top, bad, LIMIT: tl.constexpr):
    """The scale of a row from the magnitude that has to become LIMIT: a bfloat16's number as float32. A row with a NaN has NaN,
    a subnormal scale is 0. Rounded by hand, to the even one of two: the interpreter's cast cuts off.
    """
    scale = tl.div_rn(top, tl.full(top.shape, LIMIT, tl.float32))
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
    if KIND == _INT8:
        code = nearest(tl.minimum(tl.maximum(x, -LIMIT), LIMIT)).to(tl.int32) & 255
    else:
        code = nearest(tl.minimum(tl.maximum(x, -LIMIT), LIMIT - 1)).to(tl.int32) + 8
    return code.to(tl.uint8)


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
