"""What `attention.py` launches: the walk over the keys, and the merge of the parts that a context was cut into."""

from __future__ import annotations

import triton
import triton.language as tl

from minfer.kernels.triton.kv_codes import INT4, PLAIN, kv_numbers

_PLAIN, _INT4 = tl.constexpr(PLAIN), tl.constexpr(INT4)
ALL_KEYS, SHARED_KEYS, OWN_KEYS = range(3)  # which keys a launch attends to
_ALL_KEYS, _SHARED_KEYS, _OWN_KEYS = (tl.constexpr(which) for which in (ALL_KEYS, SHARED_KEYS, OWN_KEYS))


@triton.jit
def _attend(
    q,
    q_high,
    acc,
    acc_high,
    m,
    norm,
    first_key,
    position,
    seq_len,
    k_base,
    v_base,
    k_scale_base,
    v_scale_base,
    table,
    tail,
    tail_begin,
    block_stride,
    window,
    scale,
    softcap,
    KIND: tl.constexpr,
    PTX: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_FACTOR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
    TILE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TAILS: tl.constexpr,
):
    """One tile of keys: q [BLOCK_M, DIM_TILE], position [BLOCK_M] of each row, scale in units of log2. DIM: stored elements a row."""
    key = first_key + tl.arange(0, TILE)
    at = tl.arange(0, DIM_TILE)
    # An unmasked tile lies within the sequence; past its end the block table and the pool hold anything, NaN included.
    live = key < seq_len
    block = tl.load(table + key // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    within = key % BLOCK_SIZE
    if TAILS:
        elsewhere = live & (key >= tail_begin)
        slot = tl.load(tail + (key - tail_begin), mask=elsewhere, other=0)
        block, within = tl.where(elsewhere, slot // BLOCK_SIZE, block), tl.where(elsewhere, slot % BLOCK_SIZE, within)
    offset = block * block_stride + within * DIM  # [TILE]
    k_at = k_base + offset[None, :] + at[:, None]  # [DIM_TILE, TILE]
    v_at = v_base + offset[:, None] + at[None, :]  # [TILE, DIM_TILE]
    if MASKED:
        k = tl.load(k_at, mask=live[None, :] & (at < DIM)[:, None], other=0.0)
        v = tl.load(v_at, mask=live[:, None] & (at < DIM)[None, :], other=0.0)
    elif DIM_TILE > DIM:
        k = tl.load(k_at, mask=(at < DIM)[:, None], other=0.0)
        v = tl.load(v_at, mask=(at < DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    s = tl.dot(q, kv_numbers(k, KIND, 0, PTX, q.dtype), input_precision="ieee")  # [BLOCK_M, TILE]
    if KIND == _INT4:
        s = tl.dot(q_high, kv_numbers(k, KIND, 1, PTX, q.dtype), s, input_precision="ieee")
    s *= scale
    if KIND != _PLAIN:
        at_scale = block * (block_stride // DIM) + within
        s *= tl.load(k_scale_base + at_scale, mask=live, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:  # softcap x tanh(s / softcap), by way of the exponential: tanh(x) = 1 - 2 / (e^2x + 1)
        cap = softcap * 1.4426950408889634
        s = cap * (1.0 - 2.0 / (tl.exp2(s / cap * 2.8853900817779268) + 1.0))
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (position[:, None] - key[None, :] < window)
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, axis=1))
    # A row that has seen nothing yet has m = -inf, and -inf - -inf is NaN.
    finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - finite[:, None])
    shrink = tl.exp2(m - finite)
    norm = norm * shrink + tl.sum(p, axis=1)
    if KIND != _PLAIN:
        p *= tl.load(v_scale_base + at_scale, mask=live, other=0.0).to(tl.float32)[None, :] * V_FACTOR
    weight = p.to(q.dtype)
    acc = tl.dot(weight, _small(kv_numbers(v, KIND, 0, PTX, q.dtype), V_UNIT), acc * shrink[:, None], input_precision="ieee")
    if KIND == _INT4:
        acc_high = tl.dot(weight, _small(kv_numbers(v, KIND, 1, PTX, q.dtype), V_UNIT), acc_high * shrink[:, None], input_precision="ieee")
    return acc, acc_high, m_new, norm


@triton.jit
def _small(number, UNIT: tl.constexpr):
    if UNIT != 1.0:
        number = (number * UNIT).to(number.dtype)
    return number


@triton.jit
def attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    query_start_ptr,
    seq_lens_ptr,
    tables_ptr,
    tails_ptr,
    shared_ptr,
    requests,
    q_stride,
    table_stride,
    tail_stride,
    kv_heads,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,  # query heads per KV head
    KIND: tl.constexpr,
    PTX: tl.constexpr,
    V_UNIT: tl.constexpr,
    V_FACTOR: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,  # stored elements a row: of int4 half the head
    DIM_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,  # of all launches, whose results lie side by side, this one's from FIRST_PART on
    FIRST_PART: tl.constexpr,
    KEYS: tl.constexpr,  # ALL_KEYS, SHARED_KEYS, OWN_KEYS
    SHARED_STEP: tl.constexpr,  # what is shared is attended to in multiples of so many keys
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TAILS: tl.constexpr,
    SINKS: tl.constexpr,
):
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    low = tile * 0
    if KEYS == _SHARED_KEYS:  # all tokens are one request's: they see the same keys, all of them
        start = low
        query_len = tl.load(query_start_ptr + requests)
        first = tile * BLOCK_Q
    else:
        high = low + requests - 1  # bisection for the last request whose first tile is not after ours
        while low < high:
            middle = (low + high + 1) // 2
            if tl.load(query_start_ptr + middle) // BLOCK_Q + middle <= tile:
                low = middle
            else:
                high = middle - 1
        start = tl.load(query_start_ptr + low)
        query_len = tl.load(query_start_ptr + low + 1) - start
        first = (tile - (start // BLOCK_Q + low)) * BLOCK_Q  # of this tile's tokens, among the request's new ones
    if first >= query_len:
        return
    shared = low
    if KEYS != _ALL_KEYS:
        shared = tl.load(shared_ptr) // SHARED_STEP * SHARED_STEP
    seq_len = shared if KEYS == _SHARED_KEYS else tl.load(seq_lens_ptr + low)
    row = tl.arange(0, BLOCK_M)
    token, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    real = (row < BLOCK_Q * GROUP) & (token < query_len)
    position = seq_len - query_len + token
    at = tl.arange(0, DIM_TILE)
    heads = kv_heads * GROUP
    HEAD: tl.constexpr = 2 * DIM if KIND == _INT4 else DIM
    q_at = q_ptr + (start + token).to(tl.int64)[:, None] * q_stride + head[:, None] * HEAD + at[None, :]
    q = tl.load(q_at, mask=real[:, None] & (at < DIM)[None, :], other=0.0)
    q_high = q
    if KIND == _INT4:
        q_high = tl.load(q_at + DIM, mask=real[:, None] & (at < DIM)[None, :], other=0.0)

    first_position = seq_len - query_len + first
    last_position = tl.minimum(first_position + BLOCK_Q, seq_len) - 1
    begin, end = 0, last_position // TILE + 1  # tiles of keys that any row sees
    if KEYS == _SHARED_KEYS:
        end = shared // TILE
    elif KEYS == _OWN_KEYS:
        begin = shared // TILE
    if WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // TILE
    if SPLITS > 1:
        share = (end - begin + SPLITS - 1) // SPLITS
        begin = begin + split * share
        end = tl.minimum(begin + share, end)
    bulk = begin  # tiles before it need no mask
    if KEYS == _SHARED_KEYS:
        bulk = tl.maximum(end, begin)
    elif not WINDOW:
        bulk = tl.maximum(tl.minimum((first_position + 1) // TILE, end), begin)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_TILE], tl.float32)
    if KIND == _INT4:
        acc_high = tl.zeros([BLOCK_M, DIM_TILE], tl.float32)
    else:
        acc_high = 0.0
    k_scale_base = k_scale_ptr
    v_scale_base = v_scale_ptr
    if KIND != _PLAIN:
        k_scale_base += kv_head * BLOCK_SIZE
        v_scale_base += kv_head * BLOCK_SIZE
    k_base = k_ptr + kv_head * (BLOCK_SIZE * DIM)
    v_base = v_ptr + kv_head * (BLOCK_SIZE * DIM)
    block_stride = kv_heads * (BLOCK_SIZE * DIM)
    table = tables_ptr + low.to(tl.int64) * table_stride
    tail = tails_ptr
    tail_begin = low
    if TAILS:  # from a position on, the keys of a branch lie in slots of their own; the bulk ends before
        tail = tails_ptr + low.to(tl.int64) * tail_stride + 1
        tail_begin = tl.minimum(tl.load(tail - 1), seq_len).to(tl.int32)
        bulk = tl.maximum(tl.minimum(bulk, tail_begin // TILE), begin)
    for n in range(begin, bulk):
        acc, acc_high, m, norm = _attend(
            q, q_high, acc, acc_high, m, norm, n * TILE, position, seq_len, k_base, v_base, k_scale_base, v_scale_base, table, tail,
            tail_begin, block_stride, window, scale, softcap,
            KIND, PTX, V_UNIT, V_FACTOR, BLOCK_SIZE, DIM, DIM_TILE, TILE, False, False, SOFTCAP, False,
        )  # fmt: skip
    if KEYS != _SHARED_KEYS:
        for n in range(bulk, end):
            acc, acc_high, m, norm = _attend(
                q, q_high, acc, acc_high, m, norm, n * TILE, position, seq_len, k_base, v_base, k_scale_base, v_scale_base, table, tail,
                tail_begin, block_stride, window, scale, softcap,
                KIND, PTX, V_UNIT, V_FACTOR, BLOCK_SIZE, DIM, DIM_TILE, TILE, True, WINDOW, SOFTCAP, TAILS,
            )  # fmt: skip
    if SINKS and FIRST_PART == 0:  # a key that every row sees, of value zero: the first part has it
        sink = tl.load(sinks_ptr + head, mask=real & (split == 0), other=float("-inf")) * 1.4426950408889634
        highest = tl.maximum(m, sink)
        finite = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp2(m - finite)
        norm = norm * shrink + tl.exp2(sink - finite)
        acc *= shrink[:, None]
        if KIND == _INT4:
            acc_high *= shrink[:, None]
        m = highest
    empty = norm == 0.0  # rows of padding, and of a split without keys
    norm = tl.where(empty, 1.0, norm)
    out_row = (start + token).to(tl.int64) * heads + head  # [BLOCK_M]
    out_mask = real[:, None] & (at < DIM)[None, :]
    if PARTS > 1:
        place = out_row * PARTS + FIRST_PART + split
        tl.store(lse_ptr + place, tl.where(empty, float("-inf"), m + tl.log2(norm)), mask=real)
        out_at = partial_ptr + place[:, None] * HEAD + at[None, :]
    else:
        out_at = out_ptr + out_row[:, None] * HEAD + at[None, :]
    tl.store(out_at, (acc / norm[:, None]).to(out_at.dtype.element_ty), mask=out_mask)
    if KIND == _INT4:
        tl.store(out_at + DIM, (acc_high / norm[:, None]).to(out_at.dtype.element_ty), mask=out_mask)


@triton.jit
def merge_kernel(partial_ptr, lse_ptr, out_ptr, DIM: tl.constexpr, DIM_TILE: tl.constexpr, PARTS: tl.constexpr, PARTS_TILE: tl.constexpr):
    """One head of one token: its parts' outputs, weighted by their share of the exponentials. An empty part has lse = -inf."""
    row = tl.program_id(0).to(tl.int64)
    part, at = tl.arange(0, PARTS_TILE), tl.arange(0, DIM_TILE)
    lse = tl.load(lse_ptr + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, axis=0))
    inside = (part < PARTS)[:, None] & (at < DIM)[None, :]
    partial = tl.load(partial_ptr + (row * PARTS + part)[:, None] * DIM + at[None, :], mask=inside, other=0.0)
    out = tl.sum(partial * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    tl.store(out_ptr + row * DIM + at, out.to(out_ptr.dtype.element_ty), mask=at < DIM)
