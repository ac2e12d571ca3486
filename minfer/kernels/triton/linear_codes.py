"""A quantised matrix as the Triton kernels take it: one packed layout for every element, and who multiplies by it.

    y[m, n] = sum over groups g of   scale[n, g] * sum_k x[m, k] number[n, k]   +   min[n, g] * sum_k x[m, k]

Weights are what moves: at one row 4.5 bits a weight instead of 16, and nothing but unpacking stands between that and a third of the
time. The order of codes in memory is such that nothing is ever shuffled. Codes lie in 16-bit words, 4 (or, of 8 bits, 2) in each; 32 words
are a chunk, and the parts of its words are runs of 32 inputs:

    chunk, 64 bytes:   word       0     1    ...   31
                       part 0    x0    x1         x31     a run: one product [M, 32] x [32, N], one scale
                       part 1    x32   x33        x63
                       part 2    x64   ...                (4-bit codes only)
                       part 3    x96   ...

So x is loaded in runs, a product over 32 inputs belongs to one group (groups are multiples of 32, or rows are padded to whole chunks with
zeros), and words are loaded 16 bytes at a time. What a word's parts become, `codes.py` says.

    rows   1            linear_gemv.py: sums
           2 .. 64      linear_gemm.py: matrix instructions, K cut into runs until every processor has work
           .. 256       the same without the cut: there are tiles enough
           above        the matrix is written out in the activations' type, and the vendor's library multiplies

Scales and minima are kept in 16 bits where that loses nothing, as [groups, N]: neighbours in N are loaded together. A matrix that was
quantised in another order of its inputs (act-order) has x put into that order first.

Left out: rows quantised to 8 bits (W8A8): what the matrix was calibrated for is met more exactly by x as it is. `tl.dot_scaled` for
MXFP4: on sm_90 Triton 3.6 makes the same bfloat16 product of it, elsewhere it doesn't compile, and its interpreter lacks it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton

from minfer.kernels.ops import Weight
from minfer.kernels.triton.checks import index, power_of_2
from minfer.kernels.triton.codes import KINDS, factor, number_excess, parts_of, tile_excess
from minfer.kernels.triton.linear_dense import check_product
from minfer.kernels.triton.linear_gemm import dequantize_kernel, gemm_codes_kernel, reduce_kernel
from minfer.kernels.triton.linear_gemv import gemv_codes_kernel
from minfer.kernels.triton.targets import Target
from minfer.quant import PackedWeight
from minfer.quant.elements import decode

RUN = 32
FUSED_ROWS = 256  # above, the matrix is dequantised first


def pack(codes: torch.Tensor, parts: int) -> torch.Tensor:
    """codes[N, K], of 4 bits 0..15 -> int16 [N, chunks * 32] as the page above draws them."""
    n, k = codes.shape
    chunks, bits = -(-k // (RUN * parts)), 16 // parts
    padded = torch.zeros((n, chunks * RUN * parts), dtype=codes.dtype, device=codes.device)
    padded[:, :k] = codes
    runs = padded.view(n, chunks, parts, RUN)
    words = torch.zeros((n, chunks, RUN), dtype=torch.int32, device=codes.device)
    for part in range(parts):
        words |= (runs[:, :, part].to(torch.int32) & (2**bits - 1)) << (bits * part)
    return words.to(torch.int16).view(n, chunks * RUN)


def unpack(words: torch.Tensor, parts: int, k: int) -> torch.Tensor:
    """The inverse of `pack`, int8 [N, K]."""
    bits = 16 // parts
    wide = words.view(words.shape[0], -1, RUN).to(torch.int32)
    codes = torch.stack([wide >> (bits * part) & (2**bits - 1) for part in range(parts)], dim=2)
    return codes.view(words.shape[0], -1)[:, :k].to(torch.int8)


class TritonCodesWeight(Weight):
    """A matrix [N, K] of 4- or 8-bit codes in groups, on one device."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype, device: torch.device, target: Target) -> None:
        self.shape, self.dtype, self.target = packed.shape, dtype, target
        self.element, self.group = packed.scheme.element, packed.scheme.group_size
        self.kind = KINDS[self.element]
        self.parts = parts_of(self.kind)
        # Symmetric 4-bit integers are signed; the kernels' codes aren't.
        self.offset = 8 if self.element == "int4" and packed.mins is None else 0
        codes = packed.codes.to(device)
        self.codes = pack(codes + 8 if self.offset else codes, self.parts)
        self.scales = _compact(packed.scales.to(device) * factor(self.kind))
        self.mins = None if packed.mins is None else _compact(packed.mins.to(device))
        table = packed.table
        self.table = None if table is None else torch.tensor(table, dtype=torch.float32, device=device)
        self.order = None if packed.input_order is None else packed.input_order.to(device)

    @staticmethod
    def reason_against(packed: PackedWeight) -> str | None:
        """Why these kernels can't multiply by the matrix, if so."""
        if packed.scheme.element not in KINDS:
            return f"there is no product with {packed.scheme.name} matrices"
        if packed.mins is not None and packed.scheme.element not in ("int4", "int8"):
            return "only integers may have minima"
        if packed.scheme.group_size % RUN and packed.scheme.group_size != packed.shape[1]:
            return f"groups must be multiples of {RUN} or whole rows, not {packed.scheme.group_size}"
        return None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.mins, self.table, self.order) if t is not None)

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
        operands = (x, self.codes, self.scales, self.mins, self.table, bias)
        meta = {**self._constants, "SHARED": self._shared, "HAS_BIAS": bias is not None}
        if rows == 1:
            out = torch.empty((1, n), dtype=x.dtype, device=x.device)
            meta["EXCESS"] = self.offset + number_excess(self.kind, self.target.nvidia)
            columns, tile = 8, min(4 if self.target.nvidia else 8, power_of_2(self._chunks))  # 16 bytes a lane either way
            launch = {"COLUMNS": columns, "TILE": tile, "num_warps": 4, "num_stages": 3}
            gemv_codes_kernel[(triton.cdiv(n, 2 * columns),)](*operands, out, n, **meta, **launch)
            return out
        meta["EXCESS"] = self.offset + tile_excess(self.kind, x.dtype)
        return self._many_rows(operands, rows, stride, meta)

    def _many_rows(self, operands: tuple[torch.Tensor | None, ...], rows: int, stride: int, meta: dict[str, object]) -> torch.Tensor:
        n, bias, like = self.shape[0], operands[-1], self.scales
        block_m, block_n = min(64, max(16, power_of_2(rows))), 64
        column_blocks = triton.cdiv(n, block_n)
        splits = self._splits(column_blocks) if rows <= 64 else 1
        grid = (triton.cdiv(rows, block_m), column_blocks, splits)
        launch = {"SPLITS": splits, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 3}
        out = torch.empty((rows, n), dtype=self.dtype, device=like.device)
        target = out if splits == 1 else torch.empty((splits, rows, n), dtype=torch.float32, device=like.device)
        gemm_codes_kernel[grid](*operands, target, rows, n, stride, **meta, **launch)
        if splits > 1:
            block = min(1024, power_of_2(n))
            flags = {"SPLITS": splits, "HAS_BIAS": bias is not None, "BLOCK": block, "num_warps": 4}
            reduce_kernel[(rows, triton.cdiv(n, block))](target, bias, out, rows, n, **flags)
        return out

    def _splits(self, column_blocks: int) -> int:
        """Until every processor has two programs, a power of two, and no less than four chunks for each."""
        wanted = -(-2 * self.target.processors // column_blocks)
        return max(1, min(power_of_2(wanted), self._chunks // 4, 16))

    def _dequantized(self) -> torch.Tensor:
        """[N, K] in the activations' type; inputs in the order of the codes."""
        n, k = self.shape
        out = torch.empty((n, k), dtype=self.dtype, device=self.codes.device)
        excess, tile = self.offset + number_excess(self.kind, self.target.nvidia), min(8, power_of_2(self._chunks))
        grid = (n, triton.cdiv(self._chunks, tile))
        meta = {**self._constants, "EXCESS": excess, "TILE": tile, "num_warps": 1}
        dequantize_kernel[grid](self.codes, self.scales, self.mins, self.table, out, n, **meta)
        return out

    @property
    def _chunks(self) -> int:
        return -(-self.shape[1] // (RUN * self.parts))

    @property
    def _constants(self) -> dict[str, object]:
        sizes = {"K": self.shape[1], "CHUNKS": self._chunks, "GROUPS": self.scales.shape[0], "GROUP": self.group}
        return {**sizes, "KIND": self.kind, "PARTS": self.parts, "PTX": self.target.nvidia, "HAS_MINS": self.mins is not None}

    @property
    def _shared(self) -> int:
        """How many parts of a word have one scale, wherever its chunk is."""
        return next((count for count in (4, 2) if count <= self.parts and self.group % (RUN * count) == 0), 1)

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """In plain torch: a tied quantised table is rare, and a step asks for few rows."""
        index("ids", ids, self.codes, torch.int32, torch.int64)
        count, k = ids.shape[0], self.shape[1]
        codes = unpack(self.codes[ids], self.parts, k)
        numbers = decode(codes, self.element, self.table) - self.offset
        scales = self.scales[:, ids].t().float() / factor(self.kind)
        grouped = numbers.view(count, -1, self.group) * scales[:, :, None]
        if self.mins is not None:
            grouped += self.mins[:, ids].t().float()[:, :, None]
        rows = grouped.view(count, k).to(self.dtype)
        return rows if self.order is None else torch.empty_like(rows).index_copy_(1, self.order, rows)


def _compact(values: torch.Tensor) -> torch.Tensor:
    """[N, groups] float32 -> [groups, N], in 16 bits if every value is one of those."""
    across = values.t().contiguous()
    if across.device.type == "meta":
        return across.half()  # what most formats have
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(across.to(dtype).float(), across):
            return across.to(dtype)
    return across
