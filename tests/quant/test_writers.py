"""What the writers write: packed as the formats' owners pack it, and read back to the same `PackedWeight`.

The reference packings are direct transcriptions of what the owners' packers do word by word (AutoGPTQ's `pack`, AutoAWQ's order map,
compressed-tensors' `pack_to_int32`), in plain Python loops; the owners' own files are the oracle of the readers (fixtures/).
"""

from __future__ import annotations

import json

import pytest
import torch

from minfer.errors import ConfigError
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.algorithms import gptq, round_to_nearest
from minfer.quant.bits import pack_continuous, unpack_continuous
from minfer.quant.readers import create_reader
from minfer.quant.writers import Layout, create_writer
from minfer.quantize.model import read_matrix

N, K = 64, 192


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05


def scheme(element: str, size: int, symmetric: bool = True, **more: str) -> QuantScheme:
    return QuantScheme(element, size, symmetric, **more)  # type: ignore[arg-type]


MX = {"scale_type": "e8m0"}
CASES: dict[str, tuple[str, QuantScheme]] = {
    **{
        f"gptq {e} {'sym' if s else 'asym'} {g}": ("gptq", scheme(e, g, s))
        for e in ("int2", "int3", "int4", "int8")
        for s in (True, False)
        for g in (32, 0)
    },
    "awq": ("awq", scheme("int4", 32, False)),
    "awq symmetric": ("awq", scheme("int4", 32)),
    **{
        f"compressed-tensors {e} {'sym' if s else 'asym'}": ("compressed-tensors", scheme(e, 32, s))
        for e in ("int2", "int4", "int8")
        for s in (True, False)
    },
    "compressed-tensors w8a8": ("compressed-tensors", scheme("int8", 0, activation="int8")),
    "compressed-tensors fp8": ("compressed-tensors", scheme("fp8_e4m3", 0, activation="fp8")),
    "mxfp4": ("compressed-tensors", scheme("fp4_e2m1", 32, **MX)),
    "mxfp6": ("compressed-tensors", scheme("fp6_e2m3", 32, **MX)),
    "mxfp8": ("compressed-tensors", scheme("fp8_e4m3", 32, **MX)),
    "nvfp4": ("compressed-tensors", scheme("fp4_e2m1", 16, scale_type="e4m3")),
    "nf4": ("bitsandbytes", scheme("nf4", 64)),
}


def with_size(given: QuantScheme) -> QuantScheme:
    return QuantScheme(given.element, given.group_size or K, given.symmetric, given.activation, given.scale_type)


def assert_same(read: PackedWeight, written: PackedWeight) -> None:
    written = written.widened()
    assert read.scheme == written.scheme
    for name in ("codes", "scales", "mins", "levels", "input_order"):
        ours, theirs = getattr(read, name), getattr(written, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or torch.equal(ours, theirs), name


@pytest.mark.parametrize("case", CASES)
def test_read_back_bit_for_bit(case: str, weight: torch.Tensor) -> None:
    form, given = CASES[case]
    packed = round_to_nearest(weight, with_size(given))
    writer = create_writer(form, Layout(given))
    writer.check("m", (N, K))
    settings = json.loads(json.dumps(writer.settings()))
    tensors = {f"m.{end}": tensor for end, tensor in writer.tensors(packed).items()}
    assert_same(read_matrix(create_reader(settings), "m", (N, K), tensors), packed)


def test_an_order_of_inputs_is_read_back(weight: torch.Tensor) -> None:
    x = torch.randn(500, K, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, K)[torch.randperm(K)]
    given = scheme("int4", 32)
    packed = gptq(weight, x.T @ x, given, order="group")
    assert packed.input_order is not None
    writer = create_writer("gptq", Layout(given, act_order=True))
    tensors = {f"m.{end}": tensor for end, tensor in writer.tensors(packed).items()}
    assert_same(read_matrix(create_reader(writer.settings()), "m", (N, K), tensors), packed)


def test_fp8_of_one_scale_brings_the_scale_of_its_inputs(weight: torch.Tensor) -> None:
    given = scheme("fp8_e4m3", 0, activation="fp8")
    packed = round_to_nearest(weight, with_size(given), per_tensor=True)
    writer = create_writer("compressed-tensors", Layout(given, static_inputs=True, per_tensor=True))
    tensors = writer.tensors(packed, torch.tensor(0.25))
    assert tensors["weight_scale"].shape == (1,) and tensors["input_scale"].tolist() == [0.25]
    assert_same(read_matrix(create_reader(writer.settings()), "m", (N, K), {f"m.{e}": t for e, t in tensors.items()}), packed)


def test_gptq_words_are_autogptqs(weight: torch.Tensor) -> None:
    """AutoGPTQ: qweight[row, n] holds inputs 8 row .. 8 row + 7, input i shifted by 4 i; qzeros the zeros less one, along N."""
    packed = round_to_nearest(weight, scheme("int4", 32, False))
    tensors = create_writer("gptq", Layout(scheme("int4", 32, False))).tensors(packed)
    zeros = (-packed.mins / packed.scales).round().long()  # type: ignore[operator]
    for row, n in ((0, 0), (5, 17), (23, 63)):
        word = sum(int(packed.codes[n, 8 * row + i]) << 4 * i for i in range(8))
        assert int(tensors["qweight"][row, n]) & 0xFFFFFFFF == word
    for group, word_index in ((0, 0), (5, 7)):
        word = sum((int(zeros[8 * word_index + i, group]) - 1) << 4 * i for i in range(8))
        assert int(tensors["qzeros"][group, word_index]) & 0xFFFFFFFF == word
    symmetric = create_writer("gptq", Layout(scheme("int4", 32))).tensors(round_to_nearest(weight, scheme("int4", 32)))
    assert set(symmetric["qzeros"].flatten().tolist()) == {0x77777777}


def test_awq_words_are_autoawqs(weight: torch.Tensor) -> None:
    """AutoAWQ: order_map [0, 2, 4, 6, 1, 3, 5, 7]; nibble i of a word is column order_map[i] of eight."""
    packed = round_to_nearest(weight, scheme("int4", 32, False))
    tensors = create_writer("awq", Layout(scheme("int4", 32, False))).tensors(packed)
    for k, column in ((0, 0), (100, 3), (191, 7)):
        word = sum(int(packed.codes[8 * column + source, k]) << 4 * i for i, source in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
        assert int(tensors["qweight"][k, column]) & 0xFFFFFFFF == word


def test_compressed_tensors_words_are_offset_binary(weight: torch.Tensor) -> None:
    packed = round_to_nearest(weight, scheme("int4", 32))
    tensors = create_writer("compressed-tensors", Layout(scheme("int4", 32))).tensors(packed)
    word = sum((int(packed.codes[9, 16 + i]) + 8) << 4 * i for i in range(8))
    assert int(tensors["weight_packed"][9, 2]) & 0xFFFFFFFF == word
    assert tensors["weight_shape"].tolist() == [N, K]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [32, 96, 100])
def test_packing_is_one_stream_of_bits(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (3, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_continuous(codes, bits)
    stream = sum(int(code) << bits * n for n, code in enumerate(codes[1]))
    assert [int(word) & 0xFFFFFFFF for word in words[1]] == [stream >> 32 * n & 0xFFFFFFFF for n in range(-(-count * bits // 32))]
    assert torch.equal(unpack_continuous(words, bits, count), codes)


@pytest.mark.parametrize(
    ("form", "layout", "why"),
    [
        ("awq", Layout(scheme("int8", 32)), "it holds 4-bit integers"),
        ("awq", Layout(scheme("int4", 32), act_order=True), "no order of inputs"),
        ("gptq", Layout(scheme("nf4", 64)), "it holds integers"),
        ("compressed-tensors", Layout(scheme("int3", 32)), "lay 3 bits out differently"),
        ("compressed-tensors", Layout(scheme("nf4", 64)), "use bitsandbytes for nf4"),
        ("bitsandbytes", Layout(scheme("int4", 32)), "for nf4 only"),
        ("marlin", Layout(scheme("int4", 32)), "no checkpoint format is called 'marlin'"),
    ],
)
def test_what_a_format_can_not_hold_is_refused(form: str, layout: Layout, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        create_writer(form, layout)
