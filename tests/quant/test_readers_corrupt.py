"""Damaged and hostile quantised checkpoints: a ModelLoadError, or a sound matrix; never a crash, a hang or numbers that aren't finite."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from formats import FORMATS, Tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minfer.errors import ModelLoadError
from minfer.quant import PackedWeight
from minfer.quant.readers import create_reader, quant_method

LAYER = "model.layers.0.mlp.up_proj"
N, K = 32, 64
TYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
}
SCALES = (
    "scales",
    "scale",
    "weight_scale",
    "weight_scale_inv",
    "_weight_scale",
    "weight.absmax",
    "weight.nested_absmax",
    "SCB",
    "q_scale_max",
)


@dataclass(frozen=True)
class Header:
    shape: tuple[int, ...]
    dtype: str


def sample(name: str) -> tuple[dict[str, Any], Tensors]:
    parts, _ = FORMATS[name].make(torch.Generator().manual_seed(0), N, K)
    return copy.deepcopy(FORMATS[name].settings), {end: part.contiguous() for end, part in parts.items()}


def read(config: Any, tensors: Tensors, shape: tuple[int, int] = (N, K)) -> PackedWeight | None:
    headers = {end: Header(tuple(part.shape), TYPES[part.dtype]) for end, part in tensors.items()}
    stored = create_reader(config).matrix(LAYER, shape, headers)
    return None if stored is None else stored.read(lambda end: tensors[end])


@pytest.mark.parametrize("name", FORMATS)
def test_the_samples_are_sound(name: str) -> None:
    packed = read(*sample(name))
    assert packed is not None
    assert packed.dequantize().isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (32, 32), (16, 128), (64, 32), (31, 65)])
def test_a_matrix_of_another_shape(name: str, shape: tuple[int, int]) -> None:
    """(16, 128) and (64, 32) hold as many weights, so only a reader that looks at shapes, not at bytes, can tell."""
    with pytest.raises(ModelLoadError):
        read(*sample(name), shape)


@pytest.mark.parametrize("name", [name for name in FORMATS if "mx" not in name])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_scales_that_no_model_has(name: str, value: float) -> None:
    """One that isn't finite, or all of them zero."""
    config, tensors = sample(name)
    end = next(end for end in SCALES if end in tensors and tensors[end].dtype != torch.uint8)
    if value == 0.0 and end == "weight.nested_absmax":
        pytest.skip("the offset remains, and with it a scale")
    scales = tensors[end].float()
    if value == 0.0:
        scales.zero_()
    else:
        scales.view(-1)[0] = value
    kind = tensors[end].dtype
    tensors[end] = (scales.nan_to_num(nan=math.nan, posinf=math.nan) if kind == torch.float8_e4m3fn else scales).to(
        kind
    )  # no infinity there
    with pytest.raises(ModelLoadError, match=r"zero|finite"):
        read(config, tensors)


@pytest.mark.parametrize("name", [name for name in FORMATS if "mx" in name])
def test_the_not_a_number_of_powers_of_two(name: str) -> None:
    config, tensors = sample(name)
    tensors["weight_scale"][0, 0] = 255
    with pytest.raises(ModelLoadError, match="finite"):
        read(config, tensors)


@pytest.mark.parametrize("name", [name for name in FORMATS if "fp8" in name or "mxfp8" in name])
def test_weights_that_are_not_numbers(name: str) -> None:
    config, tensors = sample(name)
    tensors["weight"].view(torch.uint8)[3, 5] = 0x7F
    with pytest.raises(ModelLoadError, match="NaN"):
        read(config, tensors)


def test_a_zero_group_is_not_an_error() -> None:
    """Whole groups of zeros occur, and some tools give them a scale of zero."""
    config, tensors = sample("awq")
    tensors["scales"][0, 0] = 0
    packed = read(config, tensors)
    assert packed is not None
    assert not packed.dequantize()[0, :32].any()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("gptq", {"bits": 8}, "bits=8"),
        ("gptq", {"bits": 3}, "bits=3"),
        ("gptq", {"bits": 40}, "bits=40"),
        ("gptq", {"bits": "4"}, "bits='4'"),
        ("gptq", {"bits": True}, "bits=True"),
        ("gptq", {"group_size": 64}, "group_size=64"),
        ("gptq", {"group_size": 0}, "group_size=0"),
        ("gptq", {"group_size": -7}, "group_size=-7"),
        ("gptq", {"group_size": 2**40}, "group_size"),
        ("gptq", {"group_size": 2**30}, "longer"),
        ("gptq", {"checkpoint_format": "marlin"}, "'marlin' is not supported; use"),
        ("gptq", {"dynamic": {"+:([": {"bits": 8}}}, "regular expression"),
        ("gptq", {"dynamic": {"+:" + "(a+)+" * 300: {}}}, "regular expression of"),
        ("gptq", {"dynamic": [1]}, "dynamic"),
        ("awq", {"bits": 8}, "8 bits is not supported"),
        ("awq", {"version": "marlin"}, "'marlin' is not supported"),
        ("awq", {"version": "gemv"}, "gemv"),
        ("awq", {"group_size": 16}, "group_size=16"),
        ("compressed-tensors int4", {"config_groups": {}}, "config_groups"),
        ("compressed-tensors int4", {"config_groups": {"a": {"targets": ["Conv"], "weights": {"num_bits": 4}}}}, "targets"),
        ("compressed-tensors int4", {"format": "marlin-24"}, "'marlin-24' is not supported"),
        ("compressed-tensors int4", {"sparsity_config": {"format": "sparse-bitmask"}}, "sparse"),
        ("compressed-tensors int4", {"transform_config": {"config_groups": {"u": {}}}}, "transforms"),
        ("fp8 blocks", {"weight_block_size": [128]}, "weight_block_size"),
        ("fp8 blocks", {"weight_block_size": [16, 16]}, "blocks"),
        ("modelopt fp8", {"quant_algo": "INT4_AWQ"}, "'int4_awq' is not supported"),
        ("quark uint4", {"global_quant_config": {"weight": {"dtype": "int3", "group_size": 32}}}, "int3"),
        ("aqlm", {"num_codebooks": 1}, "'codes'"),
        ("aqlm", {"in_group_size": 16}, "'codes'"),
        ("aqlm", {"in_group_size": 48}, "blocks of 1 outputs and 48 inputs"),
        ("aqlm", {"nbits_per_codebook": 20}, "nbits_per_codebook=20"),
        ("bitnet", {"linear_class": "bitlinear2"}, "'bitlinear2' is not supported; use"),
        ("bitnet", {"use_rms_norm": True}, "normalise their inputs (use_rms_norm) is not supported"),
        ("bitnet autobitlinear", {"quantization_mode": "online"}, "quantization_mode offline"),
        ("exl2, 2 to 8 bits", {"bits": "4"}, "bits='4'"),
        ("auto-round", {"packing_format": "auto_round:marlin"}, "marlin"),
        ("auto-round", {"extra_config": {LAYER: {"bits": 8}}}, "bits=8"),
    ],
)
def test_a_config_that_lies_or_asks_for_what_is_not_there(name: str, change: dict[str, Any], words: str) -> None:
    config, tensors = sample(name)
    with pytest.raises(ModelLoadError, match=re.escape(words)):
        read({**config, **change}, tensors)


def test_layers_with_settings_of_their_own() -> None:
    """GPTQModel's `dynamic` and AutoRound's `extra_config`: the last matrix would not fit 4 bits."""
    _, tensors = sample("gptq, 8 bits")
    gptq, auto = sample("gptq")[0], sample("auto-round gptq")[0]
    for config in (
        {**gptq, "dynamic": {"-:.*head": {}, r"+:.*\.up_proj": {"bits": 8}}},
        {**auto, "extra_config": {LAYER: {"bits": 8}}},
        {**auto, "extra_config": {r".*mlp\.up_.*": {"bits": 8}}},
    ):
        assert read(config, tensors) is not None


def test_zero_points_that_old_releases_left_unpacked() -> None:
    """compressed-tensors before 0.10: a signed byte each, minus 2^(bits - 1) as all of its integers."""
    config, tensors = sample("compressed-tensors int4 asymmetric")
    packed = read(config, tensors)
    words = tensors["weight_zero_point"]  # [N / 8, G]
    zeros = torch.stack([words >> 4 * place & 15 for place in range(8)], 1).reshape(N, -1)
    again = read(config, {**tensors, "weight_zero_point": (zeros - 8).to(torch.int8)})
    assert packed is not None
    assert again is not None
    assert torch.equal(again.dequantize(), packed.dequantize())


def test_a_group_index_out_of_range() -> None:
    config, tensors = sample("gptq, 3 bits, act-order")
    for value in (2, -1, 2**31 - 1):
        tensors["g_idx"][0] = value
        with pytest.raises(ModelLoadError, match="g_idx"):
            read(config, tensors)


@pytest.mark.parametrize(
    ("end", "place", "value", "words"),
    [
        ("q_groups", 0, 7, "7 bits"),
        ("q_groups", 0, 4, "6 words of 6 bits for 0 inputs"),
        ("q_groups", 1, 1, "can't be"),
        ("q_groups", 3, 9, "words of"),
        ("q_groups", 3, -1, "can't be"),
        ("q_invperm", 0, 64, "order of the inputs"),
        ("q_invperm", 0, -1, "order of the inputs"),
    ],
)
def test_exl2_groups_and_orders_that_cannot_be(end: str, place: int, value: int, words: str) -> None:
    config, tensors = sample("exl2, 2 to 8 bits")
    tensors[end][place] = value
    with pytest.raises(ModelLoadError, match=words):
        read(config, tensors)


def test_bitnet_has_three_values() -> None:
    config, tensors = sample("bitnet")
    tensors["weight"][0, 0] = 0b11
    with pytest.raises(ModelLoadError, match="none of -1, 0 and 1"):
        read(config, tensors)


@pytest.mark.parametrize(
    "state",
    [b"", b"[]", b"{", b"\xff\xfe", b'{"blocksize": 0}', b'{"blocksize": 64, "shape": [64, 32]}', b'{"nested_offset": "x"}', b"[" * 9000],
)
def test_a_bitsandbytes_state_that_is_none(state: bytes) -> None:
    config, tensors = sample("bitsandbytes nf4")
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(ModelLoadError, match="quant"):
        read(config, tensors)


@pytest.mark.parametrize("method", ["mxfp4", "exl3", "quanto", "", None, 5])
def test_methods_that_are_not_read_are_named(method: Any) -> None:
    with pytest.raises(ModelLoadError, match=rf"{'unknown' if method is None else method}.*not supported; "):
        create_reader({"quant_method": method})


@pytest.mark.parametrize("config", [None, [], "awq", 5])
def test_settings_that_are_no_settings(config: Any) -> None:
    with pytest.raises(ModelLoadError, match="must be an object"):
        create_reader(config)


@pytest.mark.parametrize(
    ("config", "method"),
    [({"load_in_4bit": True}, "bitsandbytes"), ({"desc_act": False, "bits": 4}, "gptq"), ({"w_bit": 4}, "awq"), ({}, "unknown")],
)
def test_methods_that_old_configs_leave_out(config: dict[str, Any], method: str) -> None:
    assert quant_method(config) == method


WORDS = ["int4", "group", "block", "gemv", "re:(", "Linear"]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["int4", "group", "re:(", "Linear"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=600, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_fuzzed_settings(name: str, data: st.DataObject) -> None:
    config, tensors = sample(name)
    for _ in range(data.draw(st.integers(1, 3))):
        holder = data.draw(st.sampled_from(_objects(config)))
        key = data.draw(st.sampled_from(sorted(holder)) if holder else st.text(max_size=5))
        holder[key] = data.draw(JUNK | st.integers(-2, 300) | st.sampled_from([2, 3, 4, 8, 16, 32, 64, 128]))
    _read_or_refuse(config, tensors)


def _objects(value: Any) -> list[dict[str, Any]]:
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return ([value] if isinstance(value, dict) else []) + [found for item in inner for found in _objects(item)]


@settings(max_examples=600, deadline=5000, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_fuzzed_tensors(name: str, data: st.DataObject) -> None:
    """Random bytes, another shape or type, a tensor less."""
    config, tensors = sample(name)
    for _ in range(data.draw(st.integers(1, 3))):
        end = data.draw(st.sampled_from(sorted(tensors)))
        part = tensors[end]
        tensors[end] = data.draw(st.sampled_from(_CHANGES))(part, data)
    _read_or_refuse(config, tensors)


def _scrambled(part: torch.Tensor, data: st.DataObject) -> torch.Tensor:
    size = part.numel() * part.element_size()
    if size == 0:
        return part
    raw = torch.randint(0, 256, (size,), generator=_seed(data)).byte()
    return raw.view(part.dtype).view(part.shape)


def _seed(data: st.DataObject) -> torch.Generator:
    return torch.Generator().manual_seed(data.draw(st.integers(0, 99)))


_CHANGES: list[Callable[[torch.Tensor, st.DataObject], torch.Tensor]] = [
    _scrambled,
    lambda part, data: part.flatten()[: data.draw(st.integers(0, part.numel()))],
    lambda part, data: part.flatten(),
    lambda part, data: part.T if part.ndim == 2 else part[None],
    lambda part, data: part.reshape(()) if part.numel() == 1 else part[1:],
    lambda part, data: torch.zeros(part.shape, dtype=data.draw(st.sampled_from(sorted(TYPES, key=str)))),
]


def _read_or_refuse(config: Any, tensors: Tensors) -> None:
    try:
        packed = read(config, tensors)
    except ModelLoadError:
        return
    if packed is not None:
        assert packed.shape == (N, K)
        assert packed.dequantize().isfinite().all()
