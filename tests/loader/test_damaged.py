"""Damaged bodies: whatever the bytes of the weights become, a model loads with finite weights or not at all, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minfer.errors import ModelLoadError
from minfer.loader import ModelSource, open_checkpoint
from minfer.loader.check import finite
from minfer.quant import PackedWeight
from minfer.quant.gguf import PACKED_TYPES

Q8_0 = gguf.GGMLQuantizationType.Q8_0
UP = "model.layers.1.mlp.up_proj.weight"


def stream(kind: Any, path: Path, *, keep_packed: bool = True) -> dict[str, torch.Tensor]:
    """All weights as a model would get them, dequantised."""
    checkpoint = open_checkpoint(ModelSource(kind=kind, name="m", path=path))
    found = finite(checkpoint.tensors(keep_packed=keep_packed), checkpoint.tensor_infos)
    return {name: t.dequantize() if isinstance(t, PackedWeight) else t for name, t in found}


@pytest.fixture
def folder(tiny: Callable[..., Any], tmp_path: Path) -> Path:
    tiny(dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def q8(tiny: Callable[..., Any], write_gguf: Callable[..., Path], tmp_path: Path) -> Path:
    state: dict[str, Any] = {n: t.float().numpy() for n, t in tiny().state_dict().items()}
    return write_gguf(tmp_path / "m.gguf", {n: (gguf.quants.quantize(t, Q8_0), Q8_0) if t.ndim == 2 else t for n, t in state.items()})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [UP, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_plain_weight_that_is_not_finite_is_named(value: float, name: str, folder: Path) -> None:
    assert name in stream("folder", folder)
    state = load_file(folder / "model.safetensors")
    state[name].view(-1)[5] = value
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=rf"model\.safetensors: tensor '{re.escape(name)}' holds numbers that are not finite"):
        stream("folder", folder)


@pytest.mark.parametrize("kind", sorted(PACKED_TYPES - {"MXFP4", "NVFP4", "IQ1_M"}))
@pytest.mark.parametrize("bits", [0x7E00, 0x7C00, 0xFC00], ids=["NaN", "infinity", "minus infinity"])
def test_a_gguf_scale_that_is_not_finite_is_named(kind: str, bits: int, write_gguf: Callable[..., Path], tmp_path: Path) -> None:
    """The scale is where the gguf package's own dequantiser makes something that isn't finite of it (IQ1_M's is in four pieces)."""
    element = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[element]
    for at in range(0, size - 1, 2):
        down = np.ones((256, 512 // block, size), np.uint8)
        down[7, 1, at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
        down = down.reshape(256, -1)
        with np.errstate(all="ignore"):
            if not np.isfinite(gguf.quants.dequantize(down, element)).all():
                break
    else:
        pytest.fail("no half word is a scale")
    path = write_gguf(tmp_path / "m.gguf", one_layer(element, down), keys={"feed_forward_length": 512})
    with pytest.raises(ModelLoadError, match=r"down_proj.*not finite"):
        stream("gguf", path)


def one_layer(element: gguf.GGMLQuantizationType, down: np.ndarray) -> dict[str, Any]:
    """A layer of 256 hidden and 512 inner sizes, all blocks sound but those of `down`."""
    block, size = gguf.GGML_QUANT_SIZES[element]
    sound = np.ones((512, 256 // block * size), np.uint8)
    rows = {"self_attn.q": 256, "self_attn.k": 128, "self_attn.v": 128, "self_attn.o": 256, "mlp.gate": 512, "mlp.up": 512}
    return {
        "model.norm.weight": np.ones(256, np.float32),
        "model.embed_tokens.weight": (sound[:24], element),
        **{f"model.layers.0.{name}_layernorm.weight": np.ones(256, np.float32) for name in ("input", "post_attention")},
        **{f"model.layers.0.{name}_proj.weight": (sound[:count], element) for name, count in rows.items()},
        "model.layers.0.mlp.down_proj.weight": (down, element),
    }


def test_quantised_weights_that_are_all_zero_are_refused(q8: Path) -> None:
    header = gguf.GGUFReader(q8)
    tensor = next(t for t in header.tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(q8.read_bytes())
    data[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = bytes(int(tensor.n_bytes))
    q8.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"up_proj.*scales of zero"):
        stream("gguf", q8)


def _fuzz(kind: Any, path: Path, file: Path, data: st.DataObject) -> None:
    """Some bytes anywhere in the file become others, or its end goes."""
    original = file.with_suffix(".original")
    if not original.exists():
        original.write_bytes(file.read_bytes())
    damaged = bytearray(original.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        at, run = data.draw(st.integers(0, len(damaged) - 1)), data.draw(st.sampled_from(RUNS))
        damaged[at : at + len(run)] = run[: len(damaged) - at]
    if data.draw(st.integers(0, 3)) == 0:
        del damaged[data.draw(st.integers(0, len(damaged))) :]
    file.write_bytes(damaged)
    try:
        weights = stream(kind, path, keep_packed=data.draw(st.booleans()))
    except ModelLoadError:
        return
    assert all(bool(weight.float().isfinite().all()) for weight in weights.values())


RUNS = [b"\xff", b"\x00", b"\xff\x7f", b"\x00\x7c", b"\xff" * 16]
FUZZ: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=60, derandomize=True, **FUZZ)
@given(data=st.data())
def test_fuzzed_safetensors(folder: Path, data: st.DataObject) -> None:
    _fuzz("folder", folder, folder / "model.safetensors", data)


@settings(max_examples=60, derandomize=True, **FUZZ)
@given(data=st.data())
def test_fuzzed_gguf(q8: Path, data: st.DataObject) -> None:
    _fuzz("gguf", q8, q8, data)


@pytest.mark.slow
@settings(max_examples=3000, **FUZZ)
@given(data=st.data())
def test_fuzzed_safetensors_at_length(folder: Path, data: st.DataObject) -> None:
    _fuzz("folder", folder, folder / "model.safetensors", data)


@pytest.mark.slow
@settings(max_examples=3000, **FUZZ)
@given(data=st.data())
def test_fuzzed_gguf_at_length(q8: Path, data: st.DataObject) -> None:
    _fuzz("gguf", q8, q8, data)
