"""Ragged paged attention in plain torch: gather each request's K and V from its blocks, then a dense softmax.

Requests that bring one token each (most of a busy step) are padded to the longest and answered by one batched call, since
thirty-two small calls a layer would cost more than their arithmetic. Requests that bring several are done one by one.
The query heads of a group stand as extra query rows over their shared KV head, so K and V are never repeated. A quantised
cache is dequantised as it is gathered, and the rest is float32 then; any other is read in the type of the queries. Keys that lie
elsewhere (`Batch.tails`) are put into their places after the gathering.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from minfer.batch import Batch
from minfer.kernels.reference.kv_quant import dequantize
from minfer.kvcache import LayerCache


def attention(
    q: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype = q.dtype
    if cache.k_scale is not None:
        q = q.to(torch.promote_types(dtype, torch.float32))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # [T, Hq, D]
    singles: list[int] = []
    rows: list[int] = []
    start = 0
    for request, length in enumerate(batch.query_lens_host):
        if length == 1:
            singles.append(request)
            rows.append(start)
        elif length > 1:
            span = slice(start, start + length)
            out[span] = _one_request(q[span], cache, batch, request, scale, window, softcap, sinks)
        start += length
    if len(rows) == q.shape[0]:
        return _single_tokens(q, cache, batch, singles, scale, window, softcap, sinks).to(dtype)
    if rows:
        out[rows] = _single_tokens(q[rows], cache, batch, singles, scale, window, softcap, sinks)
    return out.to(dtype)


def _one_request(
    q: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    request: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q[n, Hq, D]: the new tokens of one request, the last n of its sequence."""
    n, heads, dim = q.shape
    seq_len = batch.seq_lens_host[request]
    one = slice(request, request + 1)
    k, v = _gather(cache, batch.block_tables[one], seq_len, q.dtype, None if batch.tails is None else batch.tails[one])  # [1, Hk, L, D]
    kv_heads = k.shape[1]
    # A plain causal prompt can use the kernel that never looks at the masked half; it wants K and V per query head.
    if n == seq_len and window is None and softcap is None and sinks is None:
        grouped = q.view(1, n, heads, dim).transpose(1, 2)  # [1, Hq, n, D]
        o = F.scaled_dot_product_attention(grouped, k, v, is_causal=True, scale=scale, enable_gqa=heads != kv_heads)
        return o.squeeze(0).transpose(0, 1)
    at = torch.arange(seq_len - n, seq_len, device=q.device)[:, None]
    key = torch.arange(seq_len, device=q.device)[None, :]
    visible = key <= at  # [n, L]
    if window is not None:
        visible &= at - key < window
    group = heads // kv_heads
    stacked = q.view(n, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, group * n, dim)
    sink = None if sinks is None else sinks.view(kv_heads, group, 1).expand(-1, -1, n).reshape(kv_heads, group * n)
    o = _softmax_attention(stacked, k, v, visible.repeat(group, 1)[None, None], scale, softcap, sink)
    return o.view(kv_heads, group, n, dim).permute(2, 0, 1, 3).reshape(n, heads, dim)


def _single_tokens(
    q: torch.Tensor,
    cache: LayerCache,
    batch: Batch,
    requests: list[int],
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """q[R, Hq, D]: one token of each of the given requests, the last of its sequence."""
    count, heads, dim = q.shape
    longest = max(batch.seq_lens_host[r] for r in requests)
    everyone = count == batch.num_requests
    tables = batch.block_tables if everyone else batch.block_tables[requests]
    tails = batch.tails if everyone or batch.tails is None else batch.tails[requests]
    lens = (batch.seq_lens if everyone else batch.seq_lens[requests])[:, None]  # [R, 1]
    k, v = _gather(cache, tables, longest, q.dtype, tails)  # [R, Hk, L, D]
    key = torch.arange(longest, device=q.device)[None, :]
    visible = key < lens  # [R, L]
    if window is not None:
        visible &= lens - 1 - key < window
    # Padding reads whatever the pool holds there, NaN included, and 0 x NaN is NaN: V must be clean where it is masked.
    if count > 1:
        v = v.masked_fill_(~visible[:, None, :, None], 0.0)
        k = k.masked_fill_(~visible[:, None, :, None], 0.0)
    kv_heads = k.shape[1]
    sink = None if sinks is None else sinks.view(kv_heads, heads // kv_heads)
    o = _softmax_attention(q.view(count, kv_heads, heads // kv_heads, dim), k, v, visible[:, None, None, :], scale, softcap, sink)
    return o.reshape(count, heads, dim)


def _gather(
    cache: LayerCache, tables: torch.Tensor, length: int, dtype: torch.dtype, tails: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `length` tokens behind each block table and tail, as fresh dense tensors: [R, Hk, length, D] each."""
    blocks = -(-length // cache.block_size)
    tables = tables[:, :blocks]
    out = []
    for pages, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale)):
        if scales is None:
            picked = pages[tables]  # [R, B, Hk, block_size, D]
        else:
            codes = pages.view(torch.uint8)[tables].view(pages.dtype)  # torch doesn't index 8-bit floats
            picked = dequantize(codes, scales[tables], cache.format)
        dense = picked.transpose(1, 2).flatten(2, 3)[:, :, :length].to(dtype)  # [R, Hk, length, D]
        if tails is not None:
            _put_tails(dense, pages, scales, cache, tails)
        out.append(dense)
    return out[0], out[1]


def _put_tails(dense: torch.Tensor, pages: torch.Tensor, scales: torch.Tensor | None, cache: LayerCache, tails: torch.Tensor) -> None:
    """Overwrites what `dense` [R, Hk, L, D] has at the positions that tails speak of."""
    length, depth = dense.shape[2], tails.shape[1] - 1
    at = tails[:, :1] + torch.arange(depth, device=tails.device)  # [R, D]
    row, column = (at < length).nonzero(as_tuple=True)
    slots = tails[row, column + 1]
    block, within = slots // cache.block_size, slots % cache.block_size
    if scales is None:
        picked = pages[block, :, within]  # [n, Hk, D]
    else:
        codes = pages.view(torch.uint8)[block, :, within].view(pages.dtype)
        picked = dequantize(codes, scales[block, :, within], cache.format)
    dense[row, :, at[row, column]] = picked.to(dense.dtype)


def _softmax_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """q[R, Hk, M, D] against k, v [R, Hk, L, D] under a mask that broadcasts to [R, Hk, M, L]; sink[Hk, M]."""
    if softcap is None and sink is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sink is not None:  # as one key more, whose weight is then dropped
        scores = torch.cat((scores, sink.to(wide).expand(*scores.shape[:-1])[..., None]), dim=-1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v.to(wide)).to(q.dtype)
