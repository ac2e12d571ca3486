"""Products with quantised matrices: the four of a layer at serving shapes, and how much work each launch has.

A case is one layer of a model: its stacked qkv, o, gate_up and down, one after the other, for so many rows. Matrices of 4 bits come in
groups of 128 with zero points, as AWQ writes them, unless the name says otherwise; scales are bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch

from minfer.kernels.bench_shapes import SHAPES, matrices_of
from minfer.kernels.ops import Weight
from minfer.kernels.triton import TritonBackend
from minfer.kernels.triton.aot import Launch
from minfer.kernels.triton.aot_cases import DTYPE, meta
from minfer.kernels.triton.cost.family import Case, Change, Family
from minfer.kernels.triton.cost.predict import Work
from minfer.kernels.triton.cost.step import step_table
from minfer.quant import PackedWeight, QuantScheme
from minfer.quant.elements import LISTED, Element

_DEVICES = ("H100 SXM", "H200 SXM", "MI300X")
FILL = 3  # hits of L2, about what the first copy of a pipeline takes to come from memory
_Matrix = torch.Tensor | PackedWeight


def packed(
    n: int, k: int, element: Element, group: int, activation: Literal["none", "int8", "fp8"] = "none", zeros: bool = False
) -> PackedWeight:
    scales = meta(n, k // group, dtype=torch.float32)
    levels = torch.linspace(-1, 1, 16) if element in LISTED else None
    return PackedWeight(
        meta(n, k, dtype=torch.int8), scales, scales if zeros else None, QuantScheme(element, group, not zeros, activation), levels
    )


# kind -> the matrix, bytes of a weight with its part of scales and zero points, and what multiplies it
KINDS: Mapping[str, tuple[Callable[[int, int], _Matrix], float, str]] = {
    "bf16": (lambda n, k: meta(n, k), 2.0, "bf16"),
    "int4": (lambda n, k: packed(n, k, "int4", 128, zeros=True), 0.5 + 4 / 128, "bf16"),
    "int4 in 32s": (lambda n, k: packed(n, k, "int4", 32, zeros=True), 0.5 + 4 / 32, "bf16"),
    "mxfp4": (lambda n, k: packed(n, k, "fp4_e2m1", 32), 0.5 + 2 / 32, "bf16"),
    "nf4": (lambda n, k: packed(n, k, "nf4", 64), 0.5 + 2 / 64, "bf16"),
    "int8": (lambda n, k: packed(n, k, "int8", 128), 1.0 + 2 / 128, "bf16"),
    "fp8": (lambda n, k: packed(n, k, "fp8_e4m3", k), 1.0, "bf16"),
    "int8 x int8": (lambda n, k: packed(n, k, "int8", k, "int8"), 1.0, "int8"),
    "fp8 x fp8": (lambda n, k: packed(n, k, "fp8_e4m3", k, "fp8"), 1.0, "fp8"),
}


def case(model: str, kind: str, rows: int, devices: Sequence[str] = _DEVICES) -> Case:
    make, width, unit = KINDS[kind]
    matrices = list(matrices_of(SHAPES[model]).values())

    def call(backend: TritonBackend) -> None:
        for n, k in matrices:
            weight = backend.prepare(make(n, k), DTYPE)
            if not isinstance(weight, Weight):
                raise ValueError(weight)
            weight.linear(meta(rows, k), None)

    def work(kernel: str, launch: Launch) -> Work:
        return _WORK[kernel](launch, rows, width, unit)

    moved = sum(int(n * k * width) + 2 * rows * (n + k) for n, k in matrices)
    return Case(
        f"{model}, {kind}, {rows} row{'s' * (rows > 1)}",
        call,
        work,
        moved,
        sum(2 * rows * n * k for n, k in matrices),
        unit,
        devices,
        _same_code,
    )


def _same_code(launch: Launch) -> Launch:
    """Sizes that only decide how often a loop turns are those of a matrix with 4096 inputs, so that its code stands for all."""
    size = launch.constants
    if launch.function.fn.__name__ == "gemm_w8a8_kernel":
        step, k = size["BLOCK_K"], 14336  # of 4096 one compiler writes out every turn
    elif "CHUNKS" in size:
        step, k = size.get("RUN", 32) * size["PARTS"] * size.get("TILE", 1), 4096
    else:
        return launch
    if size["K"] % step or k % step:
        return launch
    changed = {"K": k, **({"CHUNKS": k * size["CHUNKS"] // size["K"]} if "CHUNKS" in size else {})}
    if size["GROUPS"] > 1:
        changed["GROUPS"] = k * size["GROUPS"] // size["K"]
    elif "GROUP" in size:
        changed["GROUP"] = k
    return dataclasses.replace(launch, constants={**size, **changed})


def _runs(steps: int, splits: int) -> Iterator[int]:
    """Steps of each of the runs that K is cut into, as the kernels cut them."""
    share = -(-steps // splits)
    for split in range(splits):
        yield max(0, min(share, steps - split * share))


def _tiles(launch: Launch, steps: int, rows: int, width: float, x_bytes: int, unit: str) -> Work:
    """A product with matrix instructions. x is in L2; rows past the last repeat it, and a warp's equal addresses are one."""
    size, (row_blocks, column_blocks, splits) = launch.constants, launch.grid
    n, k = column_blocks * size["BLOCK_N"], size["K"]
    matrix, x = n * k * width, row_blocks * size["BLOCK_M"] * k * x_bytes * column_blocks
    loaded = matrix * row_blocks + x
    repeated = x * max(0.0, 1 - rows / (row_blocks * size["BLOCK_M"]))
    out = rows * n * (4 * splits if splits > 1 else 2)
    turns = [(count,) for count in _runs(steps, splits) for _ in range(row_blocks * column_blocks)]
    moved, weights = int(matrix) + rows * k * x_bytes + out, size["BLOCK_N"] * -(-k // steps)
    return Work(turns, moved, matrix / loaded, 2 * rows * n * k, unit, FILL, weights, repeated / loaded)


def _few_rows(launch: Launch, rows: int, width: float, unit: str) -> Work:
    """Rows of x that aren't there are not read."""
    size = launch.constants
    n, k = launch.grid[0] * size["BLOCK_N"], size["K"]
    matrix, x = n * k * width, launch.grid[0] * size["BLOCK_M"] * k * 2
    turns = [(-(-size["CHUNKS"] // size["TILE"]),)] * launch.grid[0]
    near = x * (1 - rows / size["BLOCK_M"]) / (matrix + x)
    weights = size["BLOCK_N"] * size["TILE"] * size["RUN"] * size["PARTS"]
    return Work(turns, int(matrix) + 2 * rows * (n + k), matrix / (matrix + x), 2 * rows * n * k, unit, FILL, weights, near)


def _gemm_codes(launch: Launch, rows: int, width: float, unit: str) -> Work:
    return _tiles(launch, launch.constants["CHUNKS"], rows, width, 2, unit)


def _gemm_w8a8(launch: Launch, rows: int, width: float, unit: str) -> Work:
    return _tiles(launch, -(-launch.constants["K"] // launch.constants["BLOCK_K"]), rows, width, 1, unit)


def _gemv_codes(launch: Launch, rows: int, width: float, unit: str) -> Work:
    """x is loaded in the layout of the codes, for every column of a set: after the first program it is in L1."""
    size = launch.constants
    n, k = launch.grid[0] * 2 * size["COLUMNS"], size["K"]
    matrix, x = n * k * width, n / 2 * k * 2
    turns = [(-(-size["CHUNKS"] // size["TILE"]),)] * launch.grid[0]
    weights = 2 * size["COLUMNS"] * size["TILE"] * size.get("RUN", 32) * size["PARTS"]
    return Work(turns, int(matrix) + 2 * (n + k), matrix / (matrix + x), 2 * n * k, unit, weights=weights, near=x / (matrix + x))


def _gemv_dense(launch: Launch, rows: int, width: float, unit: str) -> Work:
    size = launch.constants
    n, k = launch.grid[0] * size["COLUMNS"], size["K"]
    turns = [(-(-k // size["BLOCK"]),)] * launch.grid[0]
    share = size["COLUMNS"] / (size["COLUMNS"] + size["ROWS"])
    moved, weights = int(n * k * width) + 2 * rows * (n + k), size["COLUMNS"] * size["BLOCK"]
    return Work(turns, moved, share, 2 * rows * n * k, unit, weights=weights, near=1 - share)


def _reduce(launch: Launch, rows: int, width: float, unit: str) -> Work:
    """The partial sums were written a moment ago: L2 has them."""
    out = launch.grid[0] * launch.grid[1] * launch.constants["BLOCK"] * 2
    return Work([()] * (launch.grid[0] * launch.grid[1]), out, cold=0.0)


def _quantize_rows(launch: Launch, rows: int, width: float, unit: str) -> Work:
    return Work([()] * (launch.grid[0] * launch.grid[1]), 3 * rows * launch.constants["K"], cold=0.0)


def _dequantize(launch: Launch, rows: int, width: float, unit: str) -> Work:
    count = launch.grid[0] * launch.constants["K"]
    return Work([()] * (launch.grid[0] * launch.grid[1]), int(count * (width + 2)))


_WORK: Mapping[str, Callable[[Launch, int, float, str], Work]] = {
    "gemm_codes_kernel": _gemm_codes,
    "gemm_w8a8_kernel": _gemm_w8a8,
    "few_rows_kernel": _few_rows,
    "gemv_codes_kernel": _gemv_codes,
    "gemv_kernel": _gemv_dense,
    "reduce_kernel": _reduce,
    "quantize_rows_kernel": _quantize_rows,
    "dequantize_kernel": _dequantize,
}


_H200 = ("H200 SXM",)
_LLAMA3 = "llama3.1-8b"

FAMILY = Family(
    "linear",
    "Products with quantised matrices",
    [
        *(case(_LLAMA3, "int4", rows) for rows in (1, 64, 256)),
        case(_LLAMA3, "int4", 16, ("MI300X",)),
        case(_LLAMA3, "mxfp4", 1, _H200),
        case(_LLAMA3, "fp8", 64, _H200),
        *(case(_LLAMA3, "fp8 x fp8", rows) for rows in (1, 64, 256)),
        case(_LLAMA3, "int8 x int8", 512),
        case(_LLAMA3, "bf16", 1),
        *(case("llama2-7b", "int4", rows, _H200) for rows in (1, 64)),
        *(case("qwen2.5-0.5b", "int4", rows, _H200) for rows in (1, 64)),
        case("qwen2.5-0.5b", "fp8 x fp8", 512, _H200),
    ],
    intro=(
        "One layer's four products (qkv, o, gate_up, down) for so many rows; a case's time is the sum of its launches, each with "
        "what a launch of a captured graph costs. int4: groups of 128 with zero points. *a weight*: instructions of the main loop "
        "for each weight that a lane multiplies by, everything included; an H200 can issue 3.7 for each int4 weight that comes at "
        "full bandwidth, an H100 5.2. From 257 rows on 16-bit rows are multiplied by the vendor's library, and bf16 from 5 on: "
        "those aren't predicted."
    ),
    changes=[
        Change(
            "Matrix instructions at one row, K cut among the warps of a program",
            "A sum of products on the float pipe takes 5.2 instructions a weight: the number as float32, times scale, plus minimum, "
            "times x. As the operand of a matrix instruction a pair of weights takes a shift, a logical operation and an addition, "
            "and the scale comes once a group; no second launch adds up what programs made.",
            [(f"{_LLAMA3}, int4, 1 row", "H200 SXM")],
        ),
        Change(
            "The matrix stands on the left",
            "Hopper's matrix unit takes its left operand from registers, where unpacked numbers are. On the right every number was "
            "stored to shared memory, with barriers, before it could be used. Zero points are part of the lift, so no sum of x is "
            "needed. Instructions are 3.5 a weight in place of 9.1, and yet the prediction hardly moves: x, which every block of 64 "
            "columns loads again through L2, is what binds now. Wider tiles are the next step.",
            [(f"{_LLAMA3}, int4, 64 rows", "H200 SXM")],
        ),
        Change(
            "Scaled operands in tiles of 128 x 128",
            "With more than 64 rows each tile of 64 unpacked the matrix again. A number times its scale, as a dequantised matrix "
            "holds it, leaves room for larger tiles: unpacked once for 128 rows.",
            [(f"{_LLAMA3}, int4, 256 rows", "H200 SXM")],
        ),
        Change(
            "Small floats are placed, not converted; tables are read by permutation",
            "e4m3 went through float16 and float32 to bfloat16; its bits at a bfloat16's places and one multiplication do the same. "
            "mxfp4 and nf4 loaded every number from a table: now bits are placed, or a permutation picks bytes of a table in "
            "registers.",
            [(f"{_LLAMA3}, {kind}, {rows}", "H200 SXM") for kind, rows in (("fp8", "64 rows"), ("mxfp4", "1 row"))],
        ),
        Change(
            "8-bit matrices that were calibrated for it meet 8-bit rows",
            "Nothing is unpacked, and the matrix unit does twice as much.",
            [(f"{_LLAMA3}, fp8 x fp8, {rows} rows", "H200 SXM") for rows in (64, 256)],
        ),
    ],
    more=step_table,
    first=[
        "That the PTX of `codes.py` does on the device what its evaluation says: the tests of tests/kernels/test_triton_linear.py, "
        "which take that path on an NVIDIA GPU only.",
        "int4 at 1 row against the copy bandwidth measured in the same run: the claim that unpacking no longer binds.",
        "int4 and fp8 at 16 and 64 rows: x through L2 is predicted to bind, on an L2 bandwidth that is assumed. Measure wider tiles: "
        "`python -m minfer.kernels.tune --kind int4-128 --rows 8 16 64`. 3 to 16 rows on NVIDIA aren't predicted with today's shapes.",
        "qwen2.5-0.5b at 1 row: predicted times are mostly launches. If they are longer, what a launch costs in a graph is underestimated.",
        "int4 at 64 and 256 rows: whether Hopper's matrix unit is fed from registers without the waits that the model can't see (it "
        "takes a wait for a matrix instruction to cost its latency only). If it isn't, compare with the matrix on the right.",
        "fp8 x fp8 at 256 and 512 rows against torch._scaled_mm, and the pass that rounds rows: the model takes it to come from L2.",
        "int4 at 257 to 512 rows: the dequantised product against tiles of 128 (`FUSED_ROWS`): where the two meet isn't predicted.",
        "`python -m minfer.kernels.tune`, all of it: every default here was chosen by reading code.",
    ],
)
