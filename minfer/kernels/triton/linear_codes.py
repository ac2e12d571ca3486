"""A quantised matrix as the Triton kernels take it: one packed layout for every element, and who multiplies by it.

    y[m, n] = sum over groups g of   scale[n, g] * sum_k x[m, k] number[n, k]   +   min[n, g] * sum_k x[m, k]

Weights are what moves: at one row 4.5 bits a weight instead of 16, and nothing but unpacking stands between that and a third of the
time. The order of codes in memory is such that nothing is ever shuffled. Codes lie in 16-bit words, 4 (or, of 8 bits, 2) in each; RUN
words, 32 or 64, are a chunk, and the parts of its words are runs of as many inputs:

    chunk, 64 bytes:   word       0     1    ...   31
                       part 0    x0    x1         x31     a run: one product [N, 32] x [32, M], one scale
                       part 1    x32   x33        x63
                       part 2    x64   ...                (4-bit codes only)
                       part 3    x96   ...

So x is loaded in runs, a product over a run belongs to one group (groups are multiples of a run, or rows are padded to whole chunks with
zeros), and words are loaded 16 bytes at a time. Runs of 64 take half the turns of a loop; groups of 32, and rows that a chunk of 64 words
doesn't divide, have runs of 32. What a word's parts become, `codes.py` says.

    rows   1, 2         linear_few.py: matrix instructions, K cut among the warps of a program (CDNA: at one row linear_gemv.py, sums)
           .. 64        linear_gemm.py: larger tiles, K cut into runs until every processor has work
           .. 256       the same without the cut: there are tiles enough
           above        the matrix is written out in the activations' type, and the vendor's library multiplies

Scales and minima are kept in 16 bits where that loses nothing, as [groups, N]: neighbours in N are loaded together. Minima that are integer
zero points become `zeros`, in the activations' type: what `codes.py` adds to a number. A matrix that was quantised in another order of its
inputs (act-order) has x put into that order first. Block shapes come from `tuning.json`.

Rows that are rounded to 8 bits as well: linear_w8a8.py. Left out: `tl.dot_scaled` for MXFP4, compiled
with Triton 3.6 and counted as instructions a weight, 64 outputs x 16 rows, beside the kernel here:

                                  sm_80   sm_90   gfx90a   gfx942   gfx950   sm_100
    dot_scaled, x in bfloat16     7.4     8.9     8.9      5.2      4.9      7.8       no unit multiplies these two: it unpacks as well
    linear_gemm.py                5.1     5.3     8.8      8.3
    dot_scaled, x in mxfp8                                          1.2      2.2       native, in tiles of 64 x 64 and 128 x 64

So it would gain on CDNA3 alone, in a layout of its own (its byte holds two neighbours of one group), unseen by tests: the interpreter
lacks it. Where it is native, rows would have to be rounded to mxfp8 first: worth a kernel for those two targets, which isn't written.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton

from minfer.kernels.ops import Weight
from minfer.kernels.triton.checks import index, power_of_2
from minfer.kernels.triton.codes import E4M3, E4M3_FNUZ, INT4, KINDS, TABLE, factor, number_excess, parts_of, placed_excess, table_bytes
from minfer.kernels.triton.linear_dense import check_product
from minfer.kernels.triton.linear_few import few_rows_kernel
from minfer.kernels.triton.linear_gemm import dequantize_kernel, gemm_codes_kernel, reduce_kernel
from minfer.kernels.triton.linear_gemv import gemv_codes_kernel
from minfer.kernels.triton.splits import ROWS as SPLIT_ROWS
from minfer.kernels.triton.splits import splits_of
from minfer.kernels.triton.targets import Target
from minfer.kernels.triton.tuning import Blocks, Tuning, shape_class
from minfer.quant import PackedWeight
from minfer.quant.elements import decode

FEW_ROWS = 2  # above, narrow tiles would load x through L2 too often
FUSED_ROWS = 256  # above, the matrix is dequantised first
Operands = tuple[torch.Tensor | None, ...]


def pack(codes: torch.Tensor, parts: int, run: int) -> torch.Tensor:
    """codes[N, K], of 4 bits 0..15 -> int16 [N, chunks * run] as the page above draws them."""
    n, k = codes.shape
    chunks, bits = -(-k // (run * parts)), 16 // parts
    padded = torch.zeros((n, chunks * run * parts), dtype=codes.dtype, device=codes.device)
    padded[:, :k] = codes
    runs = padded.view(n, chunks, parts, run)
    words = torch.zeros((n, chunks, run), dtype=torch.int32, device=codes.device)
    for part in range(parts):
        words |= (runs[:, :, part].to(torch.int32) & (2**bits - 1)) << (bits * part)
    return words.to(torch.int16).view(n, chunks * run)


def unpack(words: torch.Tensor, parts: int, run: int, k: int) -> torch.Tensor:
    """The inverse of `pack`, int8 [N, K]."""
    bits = 16 // parts
    wide = words.view(words.shape[0], -1, run).to(torch.int32)
    codes = torch.stack([wide >> (bits * part) & (2**bits - 1) for part in range(parts)], dim=2)
    return codes.view(words.shape[0], -1)[:, :k].to(torch.int8)


class TritonCodesWeight(Weight):
    """A matrix [N, K] of 4- or 8-bit codes in groups, on one device."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype, device: torch.device, target: Target, tuning: Tuning) -> None:
        self.shape, self.dtype, self.target, self.tuning = packed.shape, dtype, target, tuning
        self.element, self.group = packed.scheme.element, packed.scheme.group_size
        self.kind = KINDS[self.element]
        codes = packed.codes.to(device)
        if self.kind == E4M3 and target.converts_fnuz:
            self.kind, codes = E4M3_FNUZ, torch.where(codes == -128, 0, codes)
        self.parts = parts_of(self.kind)
        k = packed.shape[1]
        roomy = self.kind != TABLE or target.nvidia  # what a load of every number from a table needs of LDS doubles with the run
        self.run = 64 if roomy and self.group % 64 == 0 and k % (64 * self.parts) == 0 else 32
        # Symmetric 4-bit integers are signed; the kernels' codes aren't.
        self.offset = 8 if self.kind == INT4 and packed.mins is None else 0
        self.codes = pack(codes + 8 if self.offset else codes, self.parts, self.run)
        scales, mins = packed.scales.to(device), None if packed.mins is None else packed.mins.to(device)
        self.scales = _compact(scales * factor(self.kind), dtype)
        self.zeros = None
        if self.kind == INT4 and mins is not None and self.target.lifts:
            self.zeros = _zero_points(scales, mins, placed_excess(dtype), dtype)
        self.mins = _compact(mins, dtype) if mins is not None and self.zeros is None else None
        values = torch.tensor(packed.table) if self.kind == TABLE else None
        self.table = None if values is None else values.to(device)  # float32
        in_bytes = target.nvidia and dtype != torch.float32
        self.tile_table = self.table if values is None or not in_bytes else table_bytes(values, dtype).to(device)
        self.order = None if packed.input_order is None else packed.input_order.to(device)

    @staticmethod
    def reason_against(packed: PackedWeight) -> str | None:
        """Why these kernels can't multiply by the matrix, if so."""
        if packed.scheme.element not in KINDS:
            return f"there is no product with {packed.scheme.name} matrices"
        if packed.mins is not None and packed.scheme.element not in ("int4", "int8"):
            return "only integers may have minima"
        if packed.scheme.group_size % 32 and packed.scheme.group_size != packed.shape[1]:
            return f"groups must be multiples of 32 or whole rows, not {packed.scheme.group_size}"
        return None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.mins, self.zeros, self.table, self.order) if t is not None)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        stride = check_product(x, self.shape, self.dtype, self.codes, bias)
        rows, (n, k) = x.shape[0], self.shape
        if not rows:
            return torch.empty((0, n), dtype=x.dtype, device=x.device)
        if self.order is not None:
            x = x.index_select(1, self.order)
            stride = k
        if rows > FUSED_ROWS:
            return F.linear(x, self._dequantized(), bias)
        operands = (x, self.codes, self.scales, self.mins, self.zeros, self.tile_table, bias)
        meta = {**self._constants, "SHARED": self._shared, "HAS_BIAS": bias is not None}
        blocks = self.tuning.blocks(self.class_of(rows), self.default_blocks(rows))
        if self._is_few(rows):
            return self._few_rows(operands, rows, stride, meta, blocks)
        if rows > 1:
            return self._many_rows(operands, rows, stride, meta, blocks)
        out = torch.empty((1, n), dtype=x.dtype, device=x.device)
        meta |= {"EXCESS": self._number_excess, **blocks, "TILE": min(blocks["TILE"], power_of_2(self._chunks))}
        gemv_codes_kernel[(triton.cdiv(n, 2 * blocks["COLUMNS"]),)](*operands, out, n, **meta)
        return out

    def class_of(self, rows: int) -> str:
        """The name of the entry of `tuning.json`."""
        return shape_class("linear", f"{self.element} by {self.run}", rows)

    def default_blocks(self, rows: int) -> Blocks:
        """Where no table says better."""
        if self._is_few(rows):
            return {"BLOCK_N": 16, "TILE": 512 // self.run, "num_warps": 8, "num_stages": 3}
        if rows == 1:  # 16 bytes a lane, whether a warp has 32 or 64 of them
            return {"COLUMNS": 8, "TILE": (128 if self.target.nvidia else 256) // self.run, "num_warps": 4, "num_stages": 3}
        if rows > SPLIT_ROWS and self.target.large_tiles and (self._scaled or self._plain):
            return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}
        return {"BLOCK_M": min(64, max(16, power_of_2(rows))), "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}

    def _is_few(self, rows: int) -> bool:
        """Unpacking for a matrix instruction costs CDNA, which must add the lift outside, more than a sum of products on the float pipe."""
        return rows <= FEW_ROWS and self.target.lifts

    def _few_rows(self, operands: Operands, rows: int, stride: int, meta: Mapping[str, Any], blocks: Blocks) -> torch.Tensor:
        n = self.shape[0]
        block_m = 8 if self.target.nvidia else 16  # what a matrix instruction has on its right side
        launch = {**meta, **self._lift, **blocks, "BLOCK_M": block_m}
        out = torch.empty((rows, n), dtype=self.dtype, device=self.codes.device)
        few_rows_kernel[(triton.cdiv(n, blocks["BLOCK_N"]),)](*operands, out, rows, n, stride, **launch)
        return out

    @property
    def _lift(self) -> dict[str, Any]:
        """What `code_tile` adds to a number, and by how much it is then too high."""
        lifted, excess = self.kind != INT4 or self.target.lifts, placed_excess(self.dtype) + self.offset
        return {"LIFTED": lifted, "LIFT": -excess, "EXCESS": 0 if lifted else excess}

    def _many_rows(self, operands: Operands, rows: int, stride: int, meta: Mapping[str, Any], blocks: Blocks) -> torch.Tensor:
        n, bias, device = self.shape[0], operands[-1], self.codes.device
        row_blocks, column_blocks = triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(n, blocks["BLOCK_N"])
        splits = splits_of(row_blocks * column_blocks, self._chunks, rows, self.target)
        launch = {**meta, **self._lift, **blocks, "SPLITS": splits, "SCALED": rows > SPLIT_ROWS and self._scaled}
        out = torch.empty((rows, n), dtype=self.dtype, device=device)
        target = out if splits == 1 else torch.empty((splits, rows, n), dtype=torch.float32, device=device)
        gemm_codes_kernel[(row_blocks, column_blocks, splits)](*operands, target, rows, n, stride, **launch)
        if splits > 1:
            block = min(1024, power_of_2(n))
            flags = {"SPLITS": splits, "HAS_BIAS": bias is not None, "BLOCK": block, "num_warps": 4}
            reduce_kernel[(rows, triton.cdiv(n, block))](target, bias, out, rows, n, **flags)
        return out

    def _dequantized(self) -> torch.Tensor:
        """[N, K] in the activations' type; inputs in the order of the codes."""
        n, k = self.shape
        out = torch.empty((n, k), dtype=self.dtype, device=self.codes.device)
        tile = min(256 // self.run, power_of_2(self._chunks))
        grid = (n, triton.cdiv(self._chunks, tile))
        meta = {**self._constants, "EXCESS": self._number_excess, "TILE": tile, "num_warps": 1}
        dequantize_kernel[grid](self.codes, self.scales, self.mins, self.zeros, self.table, out, n, **meta)
        return out

    @property
    def tile_meta(self) -> dict[str, Any]:
        """The constants of `codes_tile`, but for its sizes."""
        return {**self._constants, **self._lift, "SHARED": self._shared, "SCALED": False}

    def with_minima(self) -> TritonCodesWeight:
        """The same matrix without `zeros`: what they say stands in `mins`."""
        if self.zeros is None:
            return self
        twin = copy.copy(self)
        twin.mins, twin.zeros = (self.zeros.float() + placed_excess(self.dtype)) * self.scales.float(), None
        return twin

    @property
    def _chunks(self) -> int:
        return -(-self.shape[1] // (self.run * self.parts))

    @property
    def _constants(self) -> dict[str, Any]:
        sizes = {"K": self.shape[1], "CHUNKS": self._chunks, "RUN": self.run, "GROUPS": self.scales.shape[0], "GROUP": self.group}
        has = {"HAS_MINS": self.mins is not None, "HAS_ZEROS": self.zeros is not None}
        return {**sizes, **has, "KIND": self.kind, "PARTS": self.parts, "PTX": self.target.nvidia}

    @property
    def _shared(self) -> int:
        """How many parts of a word have one scale, wherever its chunk is."""
        return next((count for count in (4, 2) if count <= self.parts and self.group % (self.run * count) == 0), 1)

    @property
    def _number_excess(self) -> int:
        """By how much `code_numbers`' are too high, beyond what `zeros` says."""
        known = placed_excess(self.dtype) if self.zeros is not None else -self.offset
        return number_excess(self.kind, self.target.nvidia) - known

    @property
    def _plain(self) -> bool:
        """One scale a row and nothing else: it waits for the end of the row."""
        return self.scales.shape[0] == 1 and self.mins is None and self.kind != INT4

    @property
    def _scaled(self) -> bool:
        """Whether number * scale in the activations' type is what the dequantised matrix would hold, to the bit."""
        return self.scales.shape[0] > 1 and self.mins is None and self.scales.dtype == self.dtype and self.target.lifts

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """In plain torch: a tied quantised table is rare, and a step asks for few rows."""
        index("ids", ids, self.codes, torch.int32, torch.int64)
        count, k = ids.shape[0], self.shape[1]
        codes = unpack(self.codes[ids], self.parts, self.run, k)
        numbers = decode(codes, self.element, self.table) - self.offset
        scales = self.scales[:, ids].t().float() / factor(self.kind)
        grouped = numbers.view(count, -1, self.group)
        if self.zeros is not None:
            grouped = grouped + (self.zeros[:, ids].t().float() + placed_excess(self.dtype))[:, :, None]
        grouped = grouped * scales[:, :, None]
        if self.mins is not None:
            grouped = grouped + self.mins[:, ids].t().float()[:, :, None]
        rows = grouped.view(count, k).to(self.dtype)
        return rows if self.order is None else torch.empty_like(rows).index_copy_(1, self.order, rows)


def _compact(values: torch.Tensor, preferred: torch.dtype) -> torch.Tensor:
    """[N, groups] float32 -> [groups, N], in 16 bits if every value is one of those; if of both kinds, of the preferred one."""
    across = values.t().contiguous()
    kinds = (torch.bfloat16, torch.float16) if preferred == torch.bfloat16 else (torch.float16, torch.bfloat16)
    if across.device.type == "meta":
        return across.to(kinds[0])  # what most checkpoints hold
    for dtype in kinds:
        if torch.equal(across.to(dtype).float(), across):
            return across.to(dtype)
    return across


def _zero_points(scales: torch.Tensor, mins: torch.Tensor, excess: int, dtype: torch.dtype) -> torch.Tensor | None:
    """-(excess + z) as [groups, N], if every minimum is -scale * z for an integer z that a type of 8 significant bits adds exactly."""
    zeros = torch.where(scales == 0, 0, torch.round(-mins / torch.where(scales == 0, 1, scales)))
    if zeros.device.type != "meta" and not (torch.equal(-zeros * scales, mins) and bool((zeros.abs() <= 64).all())):
        return None
    return -(zeros + excess).t().contiguous().to(dtype)
