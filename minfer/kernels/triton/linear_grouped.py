"""Products with 4- and 8-bit integer matrices and activations as they are (W4A16, W8A16): one layout, two kernels.

    y[m, n] = sum over groups g of   scale[n, g] * sum_k x[m, k] code[n, k]   +   min[n, g] * sum_k x[m, k]

Weights are what moves: at one row 4.5 bits a weight instead of 16, and nothing but unpacking stands between that and a third of
the time. So unpacking decides. Codes are never converted one by one:

    16 bits of memory      c3 c2 c1 c0                          four codes of 4 bits, 0..15
    (w >> 4 i) & 15 | M    0x4300 | c_i  =  128 + c_i           as a bfloat16, exactly: 7 bits of mantissa
                           0x6400 | c_i  = 1024 + c_i           as a float16

The 128 (or 1024) that every code is too high goes the way of the minimum: times the sum of x over the group, once a group and row,
outside of the product. An 8-bit code doesn't fit a bfloat16's mantissa that way, and is converted.

The order of codes in memory is such that nothing is ever shuffled. 128 inputs are a chunk; word j of a chunk's 32 words holds inputs j,
32 + j, 64 + j, 96 + j. So code i of the words is a run of 32 inputs, a slice: x is loaded in runs, a product over 32 inputs belongs to
one group (groups are multiples of 32, or rows are padded to whole chunks with zeros), and words are loaded 16 bytes at a time.

    chunk of 128 inputs, 64 bytes:   word     0     1    ...   31
                                     i = 0    x0    x1         x31     slice 0, one product [M, 32] x [32, N], one scale
                                     i = 1    x32   x33        x63     slice 1
                                     i = 2    x64   ...                8-bit codes: the same chunk as plain bytes, in order

`gemv_grouped_kernel`, one row: a program owns COLUMNS outputs, sums in float32, and K is the whole loop.
`gemm_grouped_kernel`, above: tiles of [BLOCK_M, BLOCK_N] with matrix instructions, group by group into a partial sum that the scale
multiplies (so a scale costs one operation an output and group, not one a weight). With few tiles K is cut into `SPLITS` runs that leave
float32 partial sums for `reduce_kernel`: no atomics, so a result doesn't depend on who came first. The cut depends on N, K and the
tile of rows only.

Tried, by what the compilers made of it (docs/kernels-gpu.md; nothing was timed). Scales as [N, groups]: each one a 4-byte load, 128 of
them in a tile, and spills; so they are [groups, N]. A partial sum for each slice: spills at 64 rows; so slices that share a scale share
it. x loaded once a program in the one-row kernel: each slice went through shared memory to reach the layout of the codes; so every
column loads it again, 16 bytes a thread from L1, and nothing is shared. Still open: `permutes` of sm_90 in the 4-bit loop is not 0.

Left out: rows quantised to 8 bits (W8A8), float elements (FP8, NF4, MXFP4), scales in 16 bits, and a matrix whose groups are not
runs of inputs (act-order).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.kernels.ops import Weight
from minfer.kernels.triton.checks import index, power_of_2
from minfer.kernels.triton.linear_dense import check_product
from minfer.quant import PackedWeight

CHUNK = 128
SLICE = 32
WORDS = 32


@triton.jit
def _codes(words, PART: tl.constexpr, DTYPE: tl.constexpr):
    """Code PART of each 16-bit word as a number of DTYPE, too high by 128 in bfloat16 and by 1024 in float16."""
    code = (words >> (4 * PART)) & 15
    if tl.bfloat16 == DTYPE:
        number = (code | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    elif tl.float16 == DTYPE:
        number = (code | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        number = code.to(tl.float32)
    return number


@triton.jit
def gemv_grouped_kernel(
    x_ptr, codes_ptr, scales_ptr, mins_ptr, bias_ptr, out_ptr, n,
    K: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, EXCESS: tl.constexpr,
    BITS: tl.constexpr, HAS_MINS: tl.constexpr, HAS_BIAS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE chunks at a time; a thread adds up its own words before any of it meets another's."""
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column = tl.minimum(place, n - 1)[:, None].to(tl.int64)
    word, chunk = tl.arange(0, TILE * 32)[None, :], tl.arange(0, TILE)[None, :]
    acc = tl.zeros([COLUMNS, TILE], tl.float32)
    for start in range(0, CHUNKS, TILE):
        # Chunks past the end repeat the last: x is zero there.
        base = tl.minimum(start + word // 32, CHUNKS - 1)
        if BITS == 4:
            words = tl.load(codes_ptr + column * (CHUNKS * 32) + base * 32 + word % 32)  # [COLUMNS, TILE * 32]
        for first in tl.static_range(0, 4, SHARED):  # slices that share a scale
            product = tl.zeros([COLUMNS, TILE * 32], tl.float32)
            total = tl.zeros([COLUMNS, TILE * 32], tl.float32)
            for i in tl.static_range(first, first + SHARED):
                k = (start + word // 32) * 128 + i * 32 + word % 32
                # The same for every column, but loaded for each: so it comes in the layout of the codes, from L1.
                x = tl.load(x_ptr + k + column * 0, mask=k + column * 0 < K, other=0.0).to(tl.float32)
                if BITS == 4:
                    code = _codes(words, i, x_ptr.dtype.element_ty).to(tl.float32)
                else:
                    code = tl.load(codes_ptr + column * (CHUNKS * 128) + base * 128 + i * 32 + word % 32).to(tl.float32)
                product += x * code
                total += x
            group = tl.minimum(((start + chunk) * 128 + first * 32) // GROUP, GROUPS - 1)
            scale = tl.load(scales_ptr + group * n + column)  # [COLUMNS, TILE] float32
            acc += tl.sum(tl.reshape(product, [COLUMNS, TILE, 32]), axis=2) * scale
            if HAS_MINS or EXCESS != 0:
                lift = -EXCESS * scale
                if HAS_MINS:
                    lift += tl.load(mins_ptr + group * n + column)
                acc += tl.sum(tl.reshape(total, [COLUMNS, TILE, 32]), axis=2) * lift
    out = tl.sum(acc, axis=1)
    if HAS_BIAS:
        out += tl.load(bias_ptr + place, mask=place < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=place < n)


@triton.jit
def gemm_grouped_kernel(
    x_ptr, codes_ptr, scales_ptr, mins_ptr, bias_ptr, out_ptr, rows, n, x_stride,
    K: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, SHARED: tl.constexpr, EXCESS: tl.constexpr,
    BITS: tl.constexpr, HAS_MINS: tl.constexpr, HAS_BIAS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row_block, column_block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = row_block * BLOCK_M + tl.arange(0, BLOCK_M), column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_row = x_ptr + tl.minimum(row, rows - 1).to(tl.int64)[:, None] * x_stride
    real = tl.minimum(column, n - 1)
    k = tl.arange(0, 32)
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    share: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    for chunk in range(split * share, tl.minimum(split * share + share, CHUNKS)):
        if BITS == 4:
            words = tl.load(codes_ptr + real.to(tl.int64)[None, :] * (CHUNKS * 32) + chunk * 32 + k[:, None])  # [32, BLOCK_N]
        for first in tl.static_range(0, 4, SHARED):  # slices that share a scale
            product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            for i in tl.static_range(first, first + SHARED):
                at = chunk * 128 + i * 32
                if K % 128:
                    x = tl.load(x_row + at + k[None, :], mask=(at + k < K)[None, :], other=0.0)
                else:
                    x = tl.load(x_row + at + k[None, :])
                if BITS == 4:
                    code = _codes(words, i, dtype)
                else:
                    code = tl.load(codes_ptr + real.to(tl.int64)[None, :] * (CHUNKS * 128) + at + k[:, None]).to(dtype)
                product = tl.dot(x, code, product, input_precision="ieee")
                if HAS_MINS or EXCESS != 0:
                    total += tl.sum(x.to(tl.float32), axis=1)
            group = tl.minimum((chunk * 128 + first * 32) // GROUP, GROUPS - 1)
            scale = tl.load(scales_ptr + group * n + real)
            acc += product * scale[None, :]
            if HAS_MINS or EXCESS != 0:
                lift = -EXCESS * scale
                if HAS_MINS:
                    lift += tl.load(mins_ptr + group * n + real)
                acc += total[:, None] * lift[None, :]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    if SPLITS > 1:
        tl.store(out_ptr + (split * rows + row).to(tl.int64)[:, None] * n + column[None, :], acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + real).to(tl.float32)[None, :]
        tl.store(out_ptr + row.to(tl.int64)[:, None] * n + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(partial_ptr, bias_ptr, out_ptr, rows, n, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the splits of one row, in their order."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(partial_ptr + (split * rows + row) * n + at, mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes[N, K] 0..15 -> int16 [N, chunks * 32] as the page above draws them; of 8 bits: int8 [N, chunks * 128], in order."""
    n, k = codes.shape
    chunks = -(-k // CHUNK)
    padded = torch.zeros((n, chunks * CHUNK), dtype=codes.dtype, device=codes.device)
    padded[:, :k] = codes
    if bits == 8:
        return padded
    slices = padded.view(n, chunks, 4, WORDS).to(torch.int32)
    words = slices[:, :, 0] | slices[:, :, 1] << 4 | slices[:, :, 2] << 8 | slices[:, :, 3] << 12
    return words.to(torch.int16).view(n, chunks * WORDS)


def unpack(words: torch.Tensor, bits: int, k: int) -> torch.Tensor:
    """The inverse of `pack`."""
    if bits == 8:
        return words[:, :k]
    n = words.shape[0]
    wide = words.view(n, -1, WORDS).to(torch.int32)
    return torch.stack([wide >> 4 * i & 15 for i in range(4)], dim=2).view(n, -1)[:, :k].to(torch.int8)


def _shared(group: int) -> int:
    """How many slices of a chunk have one scale, wherever the chunk is: 1, 2 or 4."""
    return 4 if group % CHUNK == 0 else 2 if group % (2 * SLICE) == 0 else 1


class TritonGroupedWeight(Weight):
    """A matrix [N, K] of int4 or int8 codes with float32 scales, and minima where it has them, on one device."""

    def __init__(self, packed: PackedWeight, dtype: torch.dtype, device: torch.device, processors: int) -> None:
        self.shape, self.dtype, self.processors = packed.shape, dtype, processors
        self.bits = 4 if packed.scheme.element == "int4" else 8
        signed = self.bits == 4 and packed.mins is None
        codes = packed.codes.to(device)
        self.codes = pack(codes + 8 if signed else codes, self.bits)
        self.scales = packed.scales.to(device, torch.float32).t().contiguous()  # [groups, N]: neighbours in N are loaded together
        self.mins = None if packed.mins is None else packed.mins.to(device, torch.float32).t().contiguous()
        self.offset = 8 if signed else 0
        magic = {torch.bfloat16: 128, torch.float16: 1024}.get(dtype, 0) if self.bits == 4 else 0
        self.excess = magic + self.offset
        self.group = packed.scheme.group_size

    @staticmethod
    def reason_against(packed: PackedWeight) -> str | None:
        """Why these kernels can't multiply by the matrix, if so."""
        if packed.scheme.element not in ("int4", "int8"):
            return f"there is no product with {packed.scheme.name} matrices yet, of integers there is"
        if packed.input_order is not None:
            return "its groups are not runs of inputs (act-order)"
        if packed.scheme.group_size % SLICE and packed.scheme.group_size != packed.shape[1]:
            return f"groups must be multiples of {SLICE} or whole rows, not {packed.scheme.group_size}"
        return None

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.mins is None else self.mins.nbytes)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        stride = check_product(x, self.shape, self.dtype, self.codes, bias)
        rows, (n, k) = x.shape[0], self.shape
        out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
        if not rows:
            return out
        chunks = -(-k // CHUNK)
        meta = {
            "K": k, "CHUNKS": chunks, "GROUPS": self.scales.shape[0], "GROUP": self.group, "SHARED": _shared(self.group),
            "EXCESS": self.excess, "BITS": self.bits, "HAS_MINS": self.mins is not None, "HAS_BIAS": bias is not None,
        }  # fmt: skip
        operands = (x, self.codes, self.scales, self.mins, bias)
        if rows == 1:
            columns, tile = 8, min(4, power_of_2(chunks))
            launch = {"COLUMNS": columns, "TILE": tile, "num_warps": 4, "num_stages": 3}
            gemv_grouped_kernel[(triton.cdiv(n, columns),)](*operands, out, n, **meta, **launch)
            return out
        block_m = min(64, max(16, power_of_2(rows)))
        block_n = 64
        column_blocks = triton.cdiv(n, block_n)
        splits = self._splits(column_blocks, chunks) if rows <= 64 else 1
        grid = (triton.cdiv(rows, block_m), column_blocks, splits)
        launch = {"SPLITS": splits, "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 3}
        if splits == 1:
            gemm_grouped_kernel[grid](*operands, out, rows, n, stride, **meta, **launch)
            return out
        partial = torch.empty((splits, rows, n), dtype=torch.float32, device=x.device)
        gemm_grouped_kernel[grid](*operands, partial, rows, n, stride, **meta, **launch)
        block = min(1024, power_of_2(n))
        flags = {"SPLITS": splits, "HAS_BIAS": bias is not None, "BLOCK": block, "num_warps": 4}
        reduce_kernel[(rows, triton.cdiv(n, block))](partial, bias, out, rows, n, **flags)
        return out

    def _splits(self, column_blocks: int, chunks: int) -> int:
        """Until every processor has two programs, a power of two, and no less than four chunks for each."""
        wanted = -(-2 * self.processors // column_blocks)
        return max(1, min(power_of_2(wanted), chunks // 4, 16))

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """In plain torch: a tied quantised table is rare, and a step asks for few rows."""
        index("ids", ids, self.codes, torch.int32, torch.int64)
        codes = unpack(self.codes[ids], self.bits, self.shape[1]).float() - self.offset
        grouped = codes.view(ids.shape[0], -1, self.group) * self.scales[:, ids].t()[:, :, None]
        if self.mins is not None:
            grouped += self.mins[:, ids].t()[:, :, None]
        return grouped.view(ids.shape[0], -1).to(self.dtype)
