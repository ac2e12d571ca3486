"""Every reader against matrices that the format owner's own code packed and dequantised (tests/quant/fixtures): bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from minfer.quant import PackedWeight
from minfer.quant.readers import create_reader
from minfer.quant.readers.aqlm import dequantize

FOLDER = Path(__file__).parent / "fixtures"
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
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Header:
    shape: tuple[int, ...]
    dtype: str


def cases() -> list[Any]:
    found = []
    for file in sorted(set(FOLDER.glob("*.safetensors")) - set(FOLDER.glob("model_*"))):
        with safe_open(file, framework="pt") as f:
            found += [pytest.param(file, case, id=f"{file.stem}-{case}") for case in json.loads(f.metadata()["cases"])]
    return found


def read(file: Path, case: str) -> tuple[PackedWeight, torch.Tensor]:
    """What minfer makes of a case, and what its tool does."""
    with safe_open(file, framework="pt") as f:
        about = json.loads(f.metadata()["cases"])[case]
        tensors = {name.split("/", 1)[1]: f.get_tensor(name) for name in f.keys() if name.startswith(case + "/")}  # noqa: SIM118
    expected = tensors.pop("expected")
    headers = {name: Header(tuple(tensor.shape), TYPES[tensor.dtype]) for name, tensor in tensors.items()}
    stored = create_reader(about["settings"]).matrix("model.layers.0.mlp.up_proj", tuple(about["shape"]), headers)
    assert stored is not None
    assert tensors.keys() == {*stored.tensors, *stored.unused} & tensors.keys(), "a tensor of the tool's would be left over"
    return stored.read(lambda end: tensors[end]), expected


@pytest.mark.parametrize(("file", "case"), cases())
def test_dequantised_matrix_equals_the_owners(file: Path, case: str) -> None:
    packed, expected = read(file, case)
    ours = packed.dequantize(expected.dtype)
    if file.stem == "aqlm":  # read as int8 in groups of 32
        most = expected.view(len(expected), -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(expected.shape)
        assert ((ours - expected).abs() <= most / 254 * 1.001).all()
    elif case == "int8" and file.stem == "bitsandbytes":  # they multiply code * maximum first, and by 1/127 then: the last bit may differ
        torch.testing.assert_close(ours, expected, rtol=2**-23, atol=0)
    else:
        assert torch.equal(ours, expected), (ours - expected).abs().max()


@pytest.mark.parametrize("case", ["1x10, 1 outputs", "2x8, 1 outputs", "2x4, 4 outputs"])
def test_aqlm_before_it_is_rounded_equals_the_owners(case: str) -> None:
    with safe_open(FOLDER / "aqlm.safetensors", framework="pt") as f:
        tensors = {end: f.get_tensor(f"{case}/{end}") for end in ("codes", "codebooks", "scales", "expected")}
    torch.testing.assert_close(dequantize(tensors), tensors["expected"], rtol=1e-6, atol=1e-6)


def test_there_is_a_fixture_of_every_tool() -> None:
    assert len(cases()) >= 40
