"""Stands in for the flash_attn package, whose kernels need a GPU: its two functions with the signatures and the meaning that it publishes
(flash_attn_interface.py of 2.8), computed from their arguments in float64, and the checks of its C++ side (flash_api.cpp).

Block tables, running sums and window sizes are taken literally, so that arguments that mean something else give something else.
"""

from __future__ import annotations

from typing import Any

import torch


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    _check(q, k, v, block_table, cu_seqlens_q, cu_seqlens_k)
    batch = cu_seqlens_q.numel() - 1
    assert cu_seqlens_k.shape == (batch + 1,) and block_table is not None and block_table.shape[0] == batch and dropout_p == 0.0
    if max_seqlen_q == 1 and q.shape[1] > k.shape[2] and window_size[0] < 0:  # rows become a grid of one token a sequence there
        assert q.shape[0] == batch
    out = torch.full_like(q, float("nan"), memory_format=torch.contiguous_format)
    starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(batch):
        rows, keys = slice(starts[b], starts[b + 1]), ends[b + 1] - ends[b]
        assert rows.stop - rows.start <= max_seqlen_q and keys <= max_seqlen_k
        out[rows] = _one(q[rows], k, v, block_table[b], keys, softmax_scale, causal, window_size, softcap)
    return out


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor:
    assert isinstance(cache_seqlens, torch.Tensor) and k is None and v is None and q.ndim == 4
    _check(q, k_cache, v_cache, block_table, cache_seqlens)
    assert block_table is not None and block_table.shape[0] == cache_seqlens.shape[0] == q.shape[0]
    options: Any = (softmax_scale, causal, window_size, softcap)
    return torch.stack([_one(q[b], k_cache, v_cache, block_table[b], int(n), *options) for b, n in enumerate(cache_seqlens)])


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor | None, *lengths: torch.Tensor) -> None:
    assert q.dtype in (torch.float16, torch.bfloat16) and k.dtype == v.dtype == q.dtype
    assert block_table is not None and block_table.dtype == torch.int32 and block_table.stride(-1) == 1
    assert all(one.dtype == torch.int32 and one.is_contiguous() for one in lengths)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert k.ndim == 4 and k.shape == v.shape and k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert k.shape[3] == q.shape[-1] <= 256 and q.shape[-2] % k.shape[2] == 0


def _one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, keys: int, scale: float | None, causal: bool,
    window: tuple[int, int], softcap: float,
) -> torch.Tensor:  # fmt: skip
    """q [n, Hq, D] of one sequence over its first `keys` tokens. The mask is aligned to its bottom right corner."""
    new, heads, dim = q.shape
    k, v = (pages[blocks.long()].flatten(0, 1)[:keys].double().repeat_interleave(heads // pages.shape[2], 1) for pages in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q.double(), k) * (dim**-0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window[0], 0 if causal else window[1]
    ahead = torch.arange(keys)[None, :] - (torch.arange(new)[:, None] + keys - new)  # [n, L]
    hidden = (ahead < -left if left >= 0 else torch.zeros_like(ahead, dtype=torch.bool)) | (ahead > right if right >= 0 else False)
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v).to(q.dtype)
