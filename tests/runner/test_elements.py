"""Every element and kind of scale, from packed matrices to logits: the model with packed weights says what transformers says with
the dequantised ones (what a code is worth is tests/quant/test_packed.py's and test_readers_against_owners.py's business)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minfer.kernels import Ops
from minfer.kernels.cpu import CpuBackend
from minfer.kernels.cpu.library import find
from minfer.kernels.reference import ReferenceBackend
from minfer.kvcache import KVCache
from minfer.layers.loading import load_weights
from minfer.loader import Checkpoint, ModelSource, open_checkpoint
from minfer.models import create_model
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.algorithms import round_to_nearest
from minfer.quant.groups import expand_blocks
from minfer.runner import BatchBuilder, ModelRunner, RowSpan

PROMPT = [(7 * i * i + 3 * i) % 500 for i in range(21)]
ROW, MATRIX, BLOCK = 0, -1, -2  # one scale for these; otherwise the size of a group


@dataclasses.dataclass(frozen=True)
class Case:
    element: str
    size: int
    symmetric: bool = True
    scale_type: str = "float"

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        element = "nf4" if self.element == "table4" else self.element
        k = weight.shape[1]
        scheme = QuantScheme(element, k if self.size <= 0 else self.size, self.symmetric, scale_type=self.scale_type)  # type: ignore[arg-type]
        packed = round_to_nearest(weight, scheme, per_tensor=self.size == MATRIX, search=False)
        if self.element == "table4":  # any other 16 values, as bitsandbytes' fp4 brings them
            assert packed.levels is not None
            other = dataclasses.replace(packed.scheme, element="table4")
            return dataclasses.replace(packed, scheme=other, levels=packed.levels * 0.5 + 0.01)
        if self.size == BLOCK:  # 32 x 48 weights, cut off at the edge
            grid = torch.rand(-(-weight.shape[0] // 32), -(-k // 48), generator=torch.Generator().manual_seed(k)) * 0.02 + 0.01
            scales, group = expand_blocks(grid, (weight.shape[0], k), (32, 48))
            codes = (weight / scales.repeat_interleave(group, 1)).to(torch.float8_e4m3fn).view(torch.int8)
            return PackedWeight(codes, scales, None, dataclasses.replace(scheme, group_size=group))
        return packed


CASES = {
    **{f"int{bits}, groups, symmetric": Case(f"int{bits}", 32) for bits in (8, 4, 3, 2)},
    **{f"int{bits}, groups, zero points": Case(f"int{bits}", 32, False) for bits in (8, 4, 3, 2)},
    "int8, a scale a row": Case("int8", ROW),
    "int4, a scale a row, zero points": Case("int4", ROW, False),
    "int8, a scale a matrix": Case("int8", MATRIX),
    "fp8 e4m3, a scale a row": Case("fp8_e4m3", ROW),
    "fp8 e5m2, a scale a matrix": Case("fp8_e5m2", MATRIX),
    "fp8 e4m3, blocks of rows and inputs": Case("fp8_e4m3", BLOCK),
    "fp4 e2m1, groups": Case("fp4_e2m1", 32),
    "fp6 e3m2, groups": Case("fp6_e3m2", 16),
    "nf4": Case("nf4", 64),
    "a table of the file's": Case("table4", 32),
    "mxfp8 e4m3": Case("fp8_e4m3", 32, scale_type="e8m0"),
    "mxfp8 e5m2": Case("fp8_e5m2", 32, scale_type="e8m0"),
    "mxfp6 e2m3": Case("fp6_e2m3", 32, scale_type="e8m0"),
    "mxfp6 e3m2": Case("fp6_e3m2", 32, scale_type="e8m0"),
    "mxfp4": Case("fp4_e2m1", 32, scale_type="e8m0"),
    "mxint8": Case("int8", 32, scale_type="e8m0"),
    "nvfp4": Case("fp4_e2m1", 16, scale_type="e4m3"),
}


class Row:
    def __init__(self) -> None:
        self.token_ids, self.blocks = PROMPT, (0, 1)


@pytest.fixture(scope="module")
def folder(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama", hidden_size=64, intermediate_size=192)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return open_checkpoint(ModelSource(kind="folder", name=str(folder), path=folder))


def logits(checkpoint: Checkpoint, packed: dict[str, PackedWeight], ops: Ops) -> torch.Tensor:
    device = torch.device("cpu")
    with torch.inference_mode():
        model = create_model(checkpoint.config, ops, 64, device)
        load_weights(model, ((name, packed.get(name, tensor)) for name, tensor in checkpoint.tensors()))
    cache = KVCache(checkpoint.config, 2, 16, torch.float32, device)
    runner = ModelRunner(model, cache, BatchBuilder(64, 1, 64, 16, device))
    return runner.logits(runner.run([RowSpan(Row(), 0, len(PROMPT), len(PROMPT))]))


@pytest.mark.parametrize("name", CASES)
def test_packed_matrices_to_logits(name: str, folder: Path, checkpoint: Checkpoint) -> None:
    from transformers import AutoModelForCausalLM

    packed = {n: CASES[name].pack(tensor) for n, tensor in checkpoint.tensors() if n.endswith("_proj.weight")}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        plain = theirs(torch.tensor([PROMPT])).logits[0]
        theirs.load_state_dict({n: p.dequantize() for n, p in packed.items()}, strict=False)
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    assert (expected - plain).norm() > 1e-4 * plain.norm(), "rounding must show, or nothing is tested"
    tables = [Ops([ReferenceBackend(keep_packed=True)], torch.float32), Ops([ReferenceBackend()], torch.float32)]
    if find() is not None:
        tables.append(Ops([CpuBackend(1, activation="none")], torch.float32))  # alone: it takes every one of these as it is
    for ops in tables:
        torch.testing.assert_close(logits(checkpoint, packed, ops), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
