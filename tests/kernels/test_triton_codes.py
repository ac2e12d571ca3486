"""What unpacks codes, for every 16-bit word and every part of it, against the elements' own definition: PTX evaluated, plain Triton run."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernels.devices import DEVICE
from kernels.ptx import evaluate, halves

from minfer.kernels.triton import codes as ptx
from minfer.kernels.triton.codes import E4M3_FNUZ, KINDS, code_tile, factor, parts_of, placed_excess
from minfer.quant.elements import decode

WORDS = torch.arange(65536)
PAIRS = WORDS | (WORDS ^ 0x5A5A) << 16  # another word in the upper half, so that nothing may leak from one into the other
HALVES = {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}


def expected(element: str, part: int, words: torch.Tensor) -> torch.Tensor:
    parts = parts_of(KINDS[element])
    code = words >> (16 // parts * part) & (2 ** (16 // parts) - 1)
    if element == "int4":
        return code.double()
    numbers = decode(code.to(torch.uint8).view(torch.int8), element, None)  # type: ignore[arg-type]
    return numbers.double() / factor(KINDS[element])


def compare(register: torch.Tensor, dtype: torch.dtype, element: str, part: int, lift: float = 0.0) -> None:
    for number, words in zip(halves(register, dtype), (WORDS, WORDS ^ 0x5A5A), strict=True):
        right = expected(element, part, words) + lift
        usable = right.isfinite()
        assert torch.equal(number[usable], right[usable])
        assert usable.sum() > 60000


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("element", "name"), [("int8", "INT8"), ("fp8_e4m3", "E4M3"), ("fp8_e5m2", "E5M2"), ("fp4_e2m1", "E2M1")])
def test_every_word_of_every_element(element: str, name: str, dtype: torch.dtype) -> None:
    text = getattr(ptx, f"{name}_AS_{HALVES[dtype]}").value
    parts = parts_of(KINDS[element])
    for part in range(parts):
        shift = 8 * part if element == "int8" else 16 // parts * (parts - 1 - part)
        compare(evaluate(text, [PAIRS, torch.tensor(shift)])[0], dtype, element, part)


@triton.jit
def tile_kernel(words_ptr, out_ptr, PART: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + at)
    tl.store(out_ptr + at, code_tile(words, 0, words_ptr, PART, KIND, True, False, tl.bfloat16))


@pytest.mark.parametrize("element", ["int8", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"])
def test_every_word_as_a_bfloat16_without_ptx(element: str) -> None:
    """As on CDNA, where nothing is rounded because nothing has to be."""
    words, out = WORDS.to(torch.int16).to(DEVICE), torch.empty(65536, dtype=torch.bfloat16, device=DEVICE)
    for part in range(parts_of(KINDS[element])):
        tile_kernel[(2,)](words, out, part, KINDS[element], BLOCK=32768)
        right = expected(element, part, WORDS)
        usable = right.isfinite()
        assert torch.equal(out.cpu().double()[usable], right[usable])
        assert usable.sum() > 60000


def test_a_code_taken_for_one_of_cdna3s_own_is_half_of_it() -> None:
    """What `E4M3_FNUZ` rests on, by torch's own type: the interpreter lacks it. -0 is made 0 beforehand, and no reader lets a NaN in."""
    codes = torch.arange(256).to(torch.uint8)
    usable = (codes != 128) & (codes & 127 != 127)
    own = codes.view(torch.float8_e4m3fnuz).double() * factor(E4M3_FNUZ)
    assert torch.equal(own[usable], codes.view(torch.float8_e4m3fn).double()[usable])
    assert usable.sum() == 253 and own[128].isnan()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("zero", [-3, 0, 8, 15, 16])
def test_int4_with_its_zero_point(zero: int, dtype: torch.dtype) -> None:
    text = getattr(ptx, f"INT4_AS_{HALVES[dtype]}").value
    lift = torch.tensor(-(placed_excess(dtype) + zero)).to(dtype)
    bits = lift.view(torch.int16).long() & 0xFFFF
    for part in range(4):
        compare(evaluate(text, [PAIRS, bits | bits << 16, torch.tensor(4 * part)])[0], dtype, "int4", part, -zero)


@pytest.mark.parametrize("dtype", HALVES)
def test_values_of_a_table(dtype: torch.dtype) -> None:
    values = torch.randn(16, generator=torch.Generator().manual_seed(5))
    table = ptx.table_bytes(values, dtype).long()
    numbers = evaluate(ptx.TABLE_VALUES.value, [PAIRS, *(entry for entry in table for _ in range(2))], 4)
    for part, register in enumerate(numbers):
        for number, words in zip(halves(register, dtype), (WORDS, WORDS ^ 0x5A5A), strict=True):
            assert torch.equal(number, values.to(dtype).double()[words >> (4 * part) & 15])


def test_int4_and_bfloat16_as_float32() -> None:
    for part in range(4):
        shift = torch.tensor(4 * part)
        for register, words in zip(evaluate(ptx.INT4_AS_FLOAT32.value, [PAIRS, shift, shift], 2), (WORDS, WORDS ^ 0x5A5A), strict=True):
            wide = register.to(torch.uint32).view(torch.float32).double()
            assert torch.equal(wide, expected("int4", part, words) + 128)
    low, high = evaluate(ptx.BFLOAT16_AS_FLOAT32.value, [PAIRS], 2)
    for register, number in zip((low, high), halves(PAIRS, torch.bfloat16), strict=True):
        wide = register.to(torch.uint32).view(torch.float32).double()
        assert torch.equal(wide[wide.isfinite()], number[number.isfinite()])


def test_a_scaled_pair_is_rounded_once() -> None:
    numbers, scales = (torch.randn(4096, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (0, 1))

    def twice(values: torch.Tensor) -> torch.Tensor:
        bits = values.view(torch.int16).long() & 0xFFFF
        return bits | bits << 16

    product = evaluate(ptx.SCALED_BFLOAT16.value, [twice(numbers), twice(scales)])[0]
    for half in halves(product, torch.bfloat16):
        assert torch.equal(half, (numbers.float() * scales.float()).bfloat16().double())
