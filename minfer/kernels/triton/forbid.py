"""A grammar's mask on the device: logits whose bit isn't set become -inf.

    grid (R, V / 4096); a program takes 4096 logits of one masked row and the 128 words of bits that speak of them

    word 0          word 1         ...       word W - 1
    ids 0 .. 31     32 .. 63                 32 W - 32 .. 32 W - 1     behind: a padded vocabulary, whose ids have no text: forbidden

A grammar library fills the bits on the host, which costs more than all that follows. They cross the bus as they are: V / 8 bytes a
row (16 KB of 128k tokens) from pinned memory, launched and not waited for. Here 4 V bytes are read and 4 V written, and a word is
loaded for the 32 logits that share it. As a table of floats (what the CPU does) the mask would be 4 V bytes more, and several launches.

Tried, by what the compilers made of it: writing -inf under a mask, and reading nothing: half of the bytes or less, but sixteen stores a
thread, of 4 bytes each and four lanes apart, where reading and writing all takes four loads and four stores of 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minfer.errors import ConfigError
from minfer.kernels.triton.checks import index, row_stride

_WORDS = 128


@triton.jit
def forbid_kernel(x_ptr, allowed_ptr, rows_ptr, x_stride, width, words, HAS_ROWS: tl.constexpr, WORDS: tl.constexpr):
    mask_row = tl.program_id(0).to(tl.int64)
    row = mask_row
    if HAS_ROWS:
        row = tl.load(rows_ptr + mask_row)
    word, bit = tl.program_id(1) * WORDS + tl.arange(0, WORDS), tl.arange(0, 32)[None, :]
    bits = tl.load(allowed_ptr + mask_row * words + word, mask=word < words, other=0)[:, None] >> bit
    at = word[:, None] * 32 + bit  # [WORDS, 32]
    x = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=0.0)
    tl.store(x_ptr + row * x_stride + at, tl.where(bits & 1 != 0, x, float("-inf")), mask=at < width)


def forbid(logits: torch.Tensor, allowed: torch.Tensor, rows: torch.Tensor | None = None) -> None:
    """`Ops.forbid`: logits[S, V] float32 in place; allowed[R, W] int32 and rows[R] int64 (None: all, R = S) on any device."""
    stride, (count, width) = row_stride("logits", logits), logits.shape
    if logits.dtype != torch.float32 or allowed.dtype != torch.int32 or not allowed.is_contiguous():
        raise ConfigError(f"forbid takes float32 logits and contiguous int32 bits, not {logits.dtype} and {allowed.dtype}")
    if len(allowed) != (count if rows is None else len(rows)):
        raise ConfigError(f"forbid needs a row of bits for each of {count if rows is None else len(rows)} rows, not {len(allowed)}")
    allowed = allowed.to(logits.device, non_blocking=True)
    if rows is not None:
        rows = rows.to(logits.device, non_blocking=True)
        index("rows", rows, logits, torch.int64)
    if len(allowed):
        grid = (len(allowed), triton.cdiv(width, 32 * _WORDS))
        forbid_kernel[grid](logits, allowed, rows, stride, width, allowed.shape[1], HAS_ROWS=rows is not None, WORDS=_WORDS, num_warps=8)
