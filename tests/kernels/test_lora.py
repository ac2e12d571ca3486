"""What adapters add to a product: every backend against float64, row by row; rows in any order, ranks of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from kernels.devices import DEVICE, DTYPES, close, randn

from minfer.batch import LoraRows
from minfer.errors import ConfigError
from minfer.kernels.cpu import CpuBackend
from minfer.kernels.lora import LoraPart, LoraWeights
from minfer.kernels.ops import Backend
from minfer.kernels.reference import ReferenceBackend
from minfer.kernels.triton import TritonBackend
from minfer.runner.lora_rows import TILE_ROWS, LoraBuffers, most_tiles

REFERENCE = ReferenceBackend()
TRITON = TritonBackend(DEVICE, torch.float16)

# By adapter and part the rank; 0 where it leaves the part alone.
RANKS = {
    "one": [[8]],
    "parts": [[8, 8, 8], [3, 0, 17], [0, 1, 0]],
    "large": [[128], [16]],
    "mixed": [[0, 40], [64, 5], [1, 1], [0, 0], [12, 33]],
}
# Rows: (adapter, how many), one after the other.
ROWS = {
    "one row": [(1, 1)],
    "a token each": [(1, 1), (0, 1), (1, 1), (0, 1), (1, 1)],
    "a tile and one more": [(1, 17), (0, 3)],
    "a prompt": [(0, 2), (1, 70), (1, 5), (0, 1)],
}


class Case:
    """Adapters over a product of K inputs and parts of these outputs."""

    def __init__(
        self, ranks: Sequence[Sequence[int]], inputs: int, outputs: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.inputs, self.outputs, self.dtype, self.device = inputs, outputs, dtype, device
        self.adapters = [[self._part(100 * i + p, rank, outputs[p]) for p, rank in enumerate(own)] for i, own in enumerate(ranks)]
        self.weights = LoraWeights.stack(self.adapters, inputs, outputs, dtype, device)

    def _part(self, seed: int, rank: int, outputs: int) -> LoraPart | None:
        if not rank:
            return None
        a = randn(rank, self.inputs, dtype=self.dtype, seed=seed) * self.inputs**-0.5
        return LoraPart(a, randn(outputs, rank, dtype=self.dtype, seed=seed + 1) * rank**-0.5, 0.5 + seed / 100)

    def expected(self, y: torch.Tensor, x: torch.Tensor, adapters: Sequence[int]) -> torch.Tensor:
        """One row and one part at a time, in float64: y + scale * B (A x)."""
        rows = y.double().clone()
        for row, adapter in enumerate(adapters):
            first = 0
            for part, size in zip(self.adapters[adapter - 1] if adapter else [], self.outputs, strict=bool(adapter)):
                if part is not None:
                    rows[row, first : first + size] += part.scale * (part.b.double() @ (part.a.double() @ x[row].double()))
                first += size
        return rows

    def check(self, backend: Backend, counts: Sequence[tuple[int, int]], tolerance: float | None = None) -> None:
        adapters = [adapter for adapter, count in counts for _ in range(count)]
        x = randn(len(adapters), self.inputs + 3, dtype=self.dtype, seed=7)[:, : self.inputs]  # rows need not touch
        y = randn(len(adapters), sum(self.outputs) + 5, dtype=self.dtype, seed=8)[:, : sum(self.outputs)]
        expected = self.expected(y, x, adapters)
        before = y.clone()
        backend.lora(y, x, backend.prepare_lora(self.weights), tiled(counts, len(self.adapters), self.device))  # type: ignore[attr-defined]
        close(y, expected, tolerance)
        untouched = [row for row, adapter in enumerate(adapters) if not adapter]
        assert torch.equal(y[untouched], before[untouched]), "a row without an adapter is the model's own, to the bit"


def tiled(counts: Sequence[tuple[int, int]], adapters: int, device: torch.device) -> LoraRows:
    buffers = LoraBuffers.empty(sum(count for _, count in counts), adapters)
    rows = buffers.fill([adapter for adapter, _ in counts], [count for _, count in counts])
    return dataclasses.replace(rows, rows=rows.rows.to(device), tiles=rows.tiles.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", RANKS)
def test_the_reference_and_the_compiled_kernels(cpu: CpuBackend, ranks: str, dtype: torch.dtype) -> None:
    outputs = {1: [40], 2: [16, 600], 3: [24, 9, 7]}[len(RANKS[ranks][0])]
    case = Case(RANKS[ranks], 50, outputs, dtype, torch.device("cpu"))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    last = len(RANKS[ranks])
    for backend in (REFERENCE, cpu):
        for counts in ROWS.values():
            case.check(backend, counts, tolerance)
        case.check(backend, [(last, 3), (0, 1), (1, 9), (last, 1), (1, 1)], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("inputs", [64, 1100])
def test_triton(ranks: str, inputs: int, dtype: torch.dtype) -> None:
    """1100 inputs are read by three programs, the last of which has fewer."""
    outputs = {1: [40], 2: [16, 200], 3: [130, 9, 7]}[len(RANKS[ranks][0])]
    case = Case(RANKS[ranks], inputs, outputs, dtype, DEVICE)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7 if dtype == torch.bfloat16 else 2**-9
    last = len(RANKS[ranks])
    for counts in [*ROWS.values(), [(last, 3), (0, 1), (1, 9), (last, 1), (1, 1)]]:
        case.check(TRITON, counts, tolerance)


@pytest.mark.parametrize("backend", [REFERENCE, TRITON], ids=["reference", "triton"])
def test_a_rows_result_does_not_depend_on_its_tile(backend: Backend, cpu: CpuBackend) -> None:
    """On the CPU to the bit: one row alone, and the same row among others of its adapter."""
    host = torch.device("cpu")
    for each, device, tolerance in ((cpu, host, 0.0), (backend, DEVICE if backend is TRITON else host, 1e-5)):
        case = Case([[9]], 70, [600], torch.float32, device)
        x, y = randn(23, 70).to(device), randn(23, 600, seed=1).to(device)
        alone, weights = y[5:6].clone(), each.prepare_lora(case.weights)
        each.lora(y, x, weights, tiled([(1, 23)], 1, device))  # type: ignore[attr-defined]
        each.lora(alone, x[5:6], weights, tiled([(1, 1)], 1, device))  # type: ignore[attr-defined]
        torch.testing.assert_close(y[5:6], alone, rtol=tolerance, atol=tolerance)


def test_tiles_that_a_graph_has_over_do_nothing() -> None:
    case = Case([[8], [4]], 64, [32], torch.float32, DEVICE)
    x, y = randn(6, 64), randn(6, 32, seed=1)
    counts = [(2, 1), (0, 1), (1, 1), (2, 1), (0, 2)]
    real = tiled(counts, 2, DEVICE)
    tiles = torch.zeros(most_tiles(6, 2) + 3, 3, dtype=torch.int32, device=DEVICE)
    tiles[: real.tiles.shape[0]] = real.tiles
    rows = torch.full((6,), 5, dtype=torch.int32, device=DEVICE)
    rows[: real.rows.shape[0]] = real.rows
    expected = case.expected(y, x, [2, 0, 1, 2, 0, 0])
    TRITON.lora(y, x, case.weights, LoraRows(rows, tiles, [], TILE_ROWS))
    close(y, expected, 1e-5)


def test_tiles_cover_each_row_with_an_adapter_once() -> None:
    for counts in ([(2, 1), (0, 1), (1, 1)] * 9, [(1, 200), (2, 3), (0, 7), (1, 1)], [(3, 64)]):
        lora = tiled(counts, 3, torch.device("cpu"))
        assert lora.tiles.shape[0] <= most_tiles(sum(count for _, count in counts), 3)
        adapters = [adapter for adapter, count in counts for _ in range(count)]
        seen: list[int] = []
        for adapter, first, count in lora.tiles.tolist():
            own = lora.rows[first : first + count].tolist()
            assert 1 <= count <= lora.tile_rows
            assert {adapters[row] for row in own} == {adapter}
            seen += own
        assert sorted(seen) == [row for row, adapter in enumerate(adapters) if adapter]


def test_what_a_kernel_cannot_read_is_named(cpu: CpuBackend) -> None:
    for backend, device in ((cpu, torch.device("cpu")), (TRITON, DEVICE)):
        weights = backend.prepare_lora(Case([[8]], 64, [32], torch.float32, device).weights)
        x, y, rows = randn(4, 64).to(device), randn(4, 32).to(device), tiled([(1, 4)], 1, device)
        with pytest.raises(ConfigError, match=r"must be torch\.float16"):
            backend.lora(y.half(), x.half(), weights, rows)
        with pytest.raises(ConfigError, match=r"\[4, 31\]"):
            backend.lora(y[:, :31], x, weights, rows)
        with pytest.raises(ConfigError, match=r"rows must be contiguous torch.int32"):
            backend.lora(y, x, weights, dataclasses.replace(rows, rows=rows.rows.long()))
