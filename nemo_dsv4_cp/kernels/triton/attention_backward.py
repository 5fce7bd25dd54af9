# SPDX-License-Identifier: Apache-2.0
"""Backward of attention for a chunk of queries, from log Z; bound by matrix products.

With p_j = exp(s_j) / Z, do the output's gradient, rotated as the queries are:

    delta = do . o,   ds_j = scale p_j (do . k_j - delta)
    dq = sum_j ds_j k_j,   dk_j = sum over queries and heads of ds_j q + p_j do
    dsink = - sum over queries of exp(sink) / Z delta

It must equal ``kernels/reference/attention.py``. The kernels: ``ready`` makes q and do of the
chunk, q in the memory of dq; ``scores`` recomputes p and ds and stores both in the keys' dtype;
``keys`` sums the gradient of a block of keys over the queries that see it, in order, and of entries
in parts where few blocks would leave most of a GPU idle; ``sum_parts`` adds those in order, so that
each run gives the same bits; ``selected`` instead adds each query's contributions to its selected
entries, by atomics, or writes them out for a sum in order; ``queries`` sums dq, and comes last. A
kernel that recomputes p and ds beside [64, 512] sums spills, or multiplies twice: stored for a
chunk, they cost 4 bytes per (query, head, key) and leave plain products.

Stored keys stand in blocks of ``ALIGNED`` rows: slot 0 of a query's window is the multiple of
``ALIGNED`` at or before its first raw key, slot 0 of the entries that of the chunk's first.
"""

# B batch rows   C queries of the chunk   N heads   D head_dim   T raw keys   P entries
# K selected entries   r rotary dims   slots: keys that p and ds are stored of

from __future__ import annotations

import triton
import triton.language as tl

from nemo_dsv4_cp.kernels.triton.attention_forward import LOG2E
from nemo_dsv4_cp.kernels.triton.norm_rotate import angles, turn
from nemo_dsv4_cp.kernels.triton.tiles import COUNTERS


@triton.jit(do_not_specialize=COUNTERS)
def ready_kernel(  # type: ignore[no-untyped-def]
    x, out, grad, cos, sin, q, do, delta, sinks, lse, of_sinks, begin, n_chunk, n_queries, n_heads,
    group_heads, row_stride, token_stride, group_stride, eps,
    D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Grid (C, N / ROWS, B): normed and rotated queries, rotated gradients, delta, each dsink.

    Heads of ``grad`` lie together in groups, and those as the output projection left them. Without
    ``NORM``, queries are only rotated.
    """
    row = tl.program_id(2).to(tl.int64)
    query = begin + tl.program_id(0)
    token = row * n_queries + query
    place = row * n_chunk + tl.program_id(0)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    at = (token * n_heads + head) * D + col
    to = (place * n_heads + head) * D + col
    inside = (head < n_heads) & (col < D)
    c, s = angles(cos, sin, token, D, ROTARY, BLOCK_D // 2)
    rows = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        rows *= tl.rsqrt(tl.sum(rows * rows, axis=1, keep_dims=True) / D + eps)
    tl.store(q + at, turn(rows, c, s, ROWS, BLOCK_D // 2).to(q.dtype.element_ty), mask=inside)
    group = (head // group_heads).to(tl.int64) * group_stride
    of_grad = row * row_stride + query.to(tl.int64) * token_stride + group
    of_grad += head % group_heads * D + col
    g = tl.load(grad + of_grad, mask=inside, other=0.0).to(tl.float32)
    o = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    # Both are rotated back; a rotation changes no product.
    of_head, here = token * n_heads + head, head < n_heads
    d = tl.sum(g * o, 1, keep_dims=True)
    tl.store(delta + of_head, d, mask=here)
    sink = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32)
    sunk = tl.exp2((sink - tl.load(lse + of_head, mask=here, other=0.0)) * LOG2E)
    tl.store(of_sinks + of_head, -sunk * d, mask=here)
    tl.store(do + to, turn(g, c, s, ROWS, BLOCK_D // 2).to(do.dtype.element_ty), mask=inside)


@triton.jit
def _entries_of(  # type: ignore[no-untyped-def]
    selected, i, raw_steps, n_selected, step, KEYS: tl.constexpr, SELECTED: tl.constexpr
):
    """Return the entries selected for step ``i``: nothing of them where all are seen."""
    if SELECTED:
        slot = (i - raw_steps) * KEYS + step
        return tl.load(selected + slot, mask=(slot >= 0) & (slot < n_selected), other=-1)
    else:
        return step


@triton.jit
def _keys_of(  # type: ignore[no-untyped-def]
    raw, entries, picked, i, steps, raw_steps, raw_base, raw_first, raw_last, entry_base,
    entry_first, entry_stop, step, col, D: tl.constexpr, KEYS: tl.constexpr,
    SELECTED: tl.constexpr,
):  # fmt: skip
    """Load the keys of step ``i``, zeros where its query sees none."""
    of_window = i < raw_steps
    slot = tl.where(of_window, i, i - raw_steps) * KEYS + step
    if SELECTED:
        at = tl.where(of_window, raw_base + slot, picked)
        seen = tl.where(of_window, (at >= raw_first) & (at <= raw_last), at >= 0)
    else:
        at = tl.where(of_window, raw_base, entry_base) + slot
        seen = at >= tl.where(of_window, raw_first, entry_first)
        seen &= at < tl.where(of_window, raw_last + 1, entry_stop)
    seen &= i < steps
    keys = tl.where(of_window, raw, entries)
    return tl.load(keys + at[:, None] * D + col, mask=seen[:, None] & (col < D), other=0.0)


@triton.jit(do_not_specialize=COUNTERS)
def scores_kernel(  # type: ignore[no-untyped-def]
    q, do, raw, entries, ranges, selected, lse, delta, p_raw, ds_raw, p_entries, ds_entries, begin,
    n_chunk, n_queries, n_heads, n_raw, n_entries, n_selected, raw_slots, entry_slots, entry_base,
    range_rows, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    ALIGNED: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Grid (C, N / HEADS, B): p and ds of [C, N, slots]."""
    row = tl.program_id(2).to(tl.int64)
    query = begin + tl.program_id(0)
    token, place = row * n_queries + query, row * n_chunk + tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, BLOCK_D)[None, :]
    here = head < n_heads
    # Rows of one product, q of eight heads and then their do: a thread holds rows eight apart of
    # what a tensor core returns, and so s and do . k of the same heads and keys.
    nth = tl.arange(0, 2 * HEADS)
    of_head = tl.program_id(1) * HEADS + nth // 16 * 8 + nth % 8
    at_head = of_head[:, None] * D + col
    of_q, of_do = q + token * n_heads * D + at_head, do + place * n_heads * D + at_head
    inside = (of_head < n_heads)[:, None] & (col < D)
    x = tl.load(tl.where((nth // 8 % 2 == 0)[:, None], of_q, of_do), mask=inside, other=0.0)
    log2_sum = tl.load(lse + token * n_heads + head, mask=here, other=0.0) * LOG2E
    d = tl.load(delta + token * n_heads + head, mask=here, other=0.0)
    sees = ranges + ((row % range_rows) * n_queries + query) * 4
    raw_first, raw_last = tl.load(sees), tl.load(sees + 1)
    entry_first, entry_stop = tl.load(sees + 2), tl.load(sees + 3)
    raw += row * n_raw * D
    entries += row * n_entries * D
    p_raw += place * n_heads * raw_slots
    ds_raw += place * n_heads * raw_slots
    p_entries += place * n_heads * entry_slots
    ds_entries += place * n_heads * entry_slots

    step = tl.arange(0, KEYS)
    raw_base, raw_steps = raw_first // ALIGNED * ALIGNED, raw_slots // KEYS
    if SELECTED:
        selected += token * n_selected
        base = 0
        n_slots = tl.minimum(entry_stop - entry_first, n_selected)
        low, high = 0, n_slots
    else:
        base = entry_first // ALIGNED * ALIGNED
        p_entries += base - entry_base
        ds_entries += base - entry_base
        # Whole blocks: what a block of keys reads, it finds written.
        n_slots = tl.cdiv(entry_stop, ALIGNED) * ALIGNED - base
        low, high = entry_first - base, entry_stop - base
    steps = raw_steps + tl.cdiv(tl.maximum(n_slots, 0), KEYS)
    # The keys of step i + 1 are loaded before the products of step i, in registers: in SASS, LDG
    # before HGMMA. Their places, where loaded too, leave after the products, or registers spill.
    picked = _entries_of(selected, 0, raw_steps, n_selected, step, KEYS, SELECTED)
    ahead = _keys_of(
        raw, entries, picked, 0, steps, raw_steps, raw_base, raw_first, raw_last, base,
        entry_first, entry_stop, step, col, D, KEYS, SELECTED,
    )  # fmt: skip
    picked = _entries_of(selected, 1, raw_steps, n_selected, step, KEYS, SELECTED)
    for i in range(0, steps):
        k = ahead
        ahead = _keys_of(
            raw, entries, picked, i + 1, steps, raw_steps, raw_base, raw_first, raw_last, base,
            entry_first, entry_stop, step, col, D, KEYS, SELECTED,
        )  # fmt: skip
        of_window = i < raw_steps
        slot = tl.where(of_window, i, i - raw_steps) * KEYS
        begins = tl.where(of_window, raw_first - raw_base, low) - slot
        ends = tl.where(of_window, raw_last + 1 - raw_base, high) - slot
        seen = ((step >= begins) & (step < ends))[None, :]
        both = tl.dot(x, tl.trans(k), input_precision="ieee")
        picked = _entries_of(selected, i + 2, raw_steps, n_selected, step, KEYS, SELECTED)
        both = tl.permute(tl.reshape(both, (HEADS // 8, 2, 8, KEYS)), (0, 2, 3, 1))
        s, dp = tl.split(both)
        s, dp = tl.reshape(s, (HEADS, KEYS)), tl.reshape(dp, (HEADS, KEYS))
        p = tl.where(seen, tl.exp2(s * (scale * LOG2E) - log2_sum[:, None]), 0.0)
        ds = p * (dp - d[:, None]) * scale
        slots = tl.where(of_window, raw_slots, entry_slots)
        to = head[:, None] * slots + (slot + step)[None, :]
        tl.store(tl.where(of_window, p_raw, p_entries) + to, p.to(k.dtype), mask=here[:, None])
        tl.store(tl.where(of_window, ds_raw, ds_entries) + to, ds.to(k.dtype), mask=here[:, None])


@triton.jit
def _query_step(  # type: ignore[no-untyped-def]
    keys, at, seen, col, ds, to, stored, acc, D: tl.constexpr
):
    """Add a step of keys [KEYS] to dq [HEADS, COLUMNS]."""
    k = tl.load(keys + at[:, None] * D + col, mask=seen[:, None] & (col < D), other=0.0)
    weights = tl.load(ds + to, mask=stored & seen[None, :], other=0.0)
    return tl.dot(weights, k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=COUNTERS)
def queries_kernel(  # type: ignore[no-untyped-def]
    raw, entries, ranges, selected, ds_raw, ds_entries, grad, begin, n_chunk, n_queries, n_heads,
    n_raw, n_entries, n_selected, raw_slots, entry_slots, entry_base, range_rows,
    D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Grid (C, N / HEADS * D / COLUMNS, B): dq of the chunk into [B, L, N, D]."""
    row = tl.program_id(2).to(tl.int64)
    query = begin + tl.program_id(0)
    token, place = row * n_queries + query, row * n_chunk + tl.program_id(0)
    parts = (D + COLUMNS - 1) // COLUMNS
    head = tl.program_id(1) // parts * HEADS + tl.arange(0, HEADS)[:, None]
    col = tl.program_id(1) % parts * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here = head < n_heads
    sees = ranges + ((row % range_rows) * n_queries + query) * 4
    raw_first, raw_last = tl.load(sees), tl.load(sees + 1)
    entry_first, entry_stop = tl.load(sees + 2), tl.load(sees + 3)
    raw += row * n_raw * D
    entries += row * n_entries * D
    ds_raw += place * n_heads * raw_slots
    ds_entries += place * n_heads * entry_slots

    acc = tl.zeros((HEADS, COLUMNS), tl.float32)
    step = tl.arange(0, KEYS)
    base = raw_first // ALIGNED * ALIGNED
    to = head * raw_slots + step[None, :]
    for slot in range(0, raw_slots, KEYS):
        at = base + slot + step
        seen = (at >= raw_first) & (at <= raw_last)
        acc = _query_step(raw, at, seen, col, ds_raw + slot, to, here, acc, D)
    to = head * entry_slots + step[None, :]
    if SELECTED:
        selected += token * n_selected
        for slot in range(0, tl.minimum(entry_stop - entry_first, n_selected), KEYS):
            at = tl.load(selected + slot + step, mask=slot + step < n_selected, other=-1)
            acc = _query_step(entries, at, at >= 0, col, ds_entries + slot, to, here, acc, D)
    else:
        base = entry_first // ALIGNED * ALIGNED
        ds_entries += base - entry_base
        for slot in range(0, entry_stop - base, KEYS):
            at = base + slot + step
            seen = (at >= entry_first) & (at < entry_stop)
            acc = _query_step(entries, at, seen, col, ds_entries + slot, to, here, acc, D)
    at_row = (token * n_heads + head) * D + col
    tl.store(grad + at_row, acc.to(grad.dtype.element_ty), mask=here & (col < D))


@triton.jit
def first_above(ranges, column, bound, begin, end):  # type: ignore[no-untyped-def]
    """Return the first of queries [begin, end) whose ``column`` of ranges, ascending, > bound."""
    low, high = begin, end
    while low < high:
        middle = (low + high) // 2
        above = tl.load(ranges + middle * 4 + column) > bound
        high = tl.where(above, middle, high)
        low = tl.where(above, low, middle + 1)
    return low


@triton.jit
def _sum_over_queries(  # type: ignore[no-untyped-def]
    factors, rows, first_row, acc, low, high, ranges, raws, entry_base, block, in_chunk, n_slots,
    n_heads, col, D: tl.constexpr, HEADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Add stored factors times the rows of queries [low, high) to a block of keys."""
    step = tl.arange(0, HEADS)
    blocks = (n_heads + HEADS - 1) // HEADS
    for i in range(low * blocks, high * blocks):
        query, head = i // blocks, i % blocks * HEADS + step[:, None]
        of_window = tl.load(ranges + query * 4) // ALIGNED * ALIGNED
        slot = block - tl.where(raws, of_window, entry_base) + tl.arange(0, ALIGNED)
        here = head < n_heads
        of_factors = ((in_chunk + query) * n_heads + head) * n_slots + slot[None, :]
        weights = tl.load(factors + of_factors, mask=here, other=0.0)
        of_rows = ((first_row + query) * n_heads + head) * D + col
        x = tl.load(rows + of_rows, mask=here & (col < D), other=0.0)
        acc = tl.dot(tl.trans(weights), x, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=COUNTERS)
def keys_kernel(  # type: ignore[no-untyped-def]
    q, do, p_raw, ds_raw, p_entries, ds_entries, ranges, grad_raw, grad_entries, partial, begin,
    n_chunk, n_queries, n_heads, n_raw, n_entries, raw_slots, entry_slots, raw_blocks, raw_base,
    entry_base, parts, range_rows,
    D: tl.constexpr, HEADS: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of keys, D / COLUMNS, B): adds to float32 [B, T, D] and [B, P, D].

    The first ``raw_blocks`` are of raw keys, the others of entries: ``parts`` programs for each
    block, with an equal share of the queries; several write to ``partial`` [B, parts, slots, D].
    """
    row = tl.program_id(2).to(tl.int64)
    raws = tl.program_id(0) < raw_blocks
    p, ds = tl.where(raws, p_raw, p_entries), tl.where(raws, ds_raw, ds_entries)
    grad = tl.where(raws, grad_raw, grad_entries)
    n_keys, n_slots = tl.where(raws, n_raw, n_entries), tl.where(raws, raw_slots, entry_slots)
    beyond = tl.program_id(0) - raw_blocks
    nth = tl.where(raws, tl.program_id(0), beyond // parts)
    part, shares = tl.where(raws, 0, beyond % parts), tl.where(raws, 1, parts)
    block = tl.where(raws, raw_base, entry_base) + nth * ALIGNED
    key = block + tl.arange(0, ALIGNED)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    ranges += (row % range_rows) * n_queries * 4
    end = begin + n_chunk
    # A query sees raw keys [first, last] and entries [first, stop).
    ends, starts = tl.where(raws, 1, 3), tl.where(raws, 0, 2)
    low = first_above(ranges, ends, tl.where(raws, block - 1, block), begin, end)
    high = first_above(ranges, starts, block + ALIGNED - 1, begin, end)
    share = tl.cdiv(tl.maximum(high - low, 0), shares)
    low = tl.minimum(low + part * share, high)
    high = tl.minimum(low + share, high)
    acc = tl.zeros((ALIGNED, COLUMNS), tl.float32)
    # One product per loop: Triton 3.4 to 3.8 miscompiles two that share an accumulator, on sm_100.
    in_chunk = row * n_chunk - begin
    acc = _sum_over_queries(
        ds, q, row * n_queries, acc, low, high, ranges, raws, entry_base, block, in_chunk, n_slots,
        n_heads, col, D, HEADS, ALIGNED,
    )  # fmt: skip
    acc = _sum_over_queries(
        p, do, in_chunk, acc, low, high, ranges, raws, entry_base, block, in_chunk, n_slots,
        n_heads, col, D, HEADS, ALIGNED,
    )  # fmt: skip
    whole = shares == 1
    slots = (tl.num_programs(0) - raw_blocks) // parts * ALIGNED
    of_partial = (row * parts + part) * slots + nth * ALIGNED + tl.arange(0, ALIGNED)
    at = tl.where(whole, row * n_keys + key, of_partial)[:, None] * D + col
    inside = ((key < n_keys) | (whole == 0))[:, None] & (col < D)
    to = tl.where(whole, grad, partial)
    acc += tl.load(to + at, mask=inside & whole, other=0.0)
    tl.store(to + at, acc, mask=inside)


@triton.jit(do_not_specialize=COUNTERS)
def sum_parts_kernel(  # type: ignore[no-untyped-def]
    partial, grad, n_entries, entry_base, parts, n_slots,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (slots / ROWS, B): adds the parts of entries from ``entry_base`` on to [B, P, D]."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    entry = entry_base + slot
    inside = (slot < n_slots) & (entry < n_entries) & (col < D)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for part in range(0, parts):
        of_part = (row * parts + part) * n_slots + slot
        acc += tl.load(partial + of_part * D + col, mask=inside, other=0.0)
    to = grad + (row * n_entries + entry) * D + col
    tl.store(to, tl.load(to, mask=inside, other=0.0) + acc, mask=inside)


@triton.jit(do_not_specialize=COUNTERS)
def selected_kernel(  # type: ignore[no-untyped-def]
    q, do, p, ds, ranges, selected, grad, begin, n_chunk, n_queries, n_heads, n_entries, n_selected,
    n_slots, range_rows,
    D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
    IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Grid (C, D / COLUMNS, B): adds to ``grad`` [B, P, D], or writes [B, C, K, D], float32."""
    row = tl.program_id(2).to(tl.int64)
    query = begin + tl.program_id(0)
    token, place = row * n_queries + query, row * n_chunk + tl.program_id(0)
    # Rows of one product, q of all heads and then their do: with two, the first would be computed
    # twice on sm_90, as in forward.
    nth = tl.arange(0, 2 * HEADS)[:, None]
    head, of_q = nth % HEADS, nth < HEADS
    here = head < n_heads
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at_q, at_do = (token * n_heads + head) * D + col, (place * n_heads + head) * D + col
    x = tl.load(tl.where(of_q, q + at_q, do + at_do), mask=here & (col < D), other=0.0)
    sees = ranges + ((row % range_rows) * n_queries + query) * 4
    visible = tl.load(sees + 3) - tl.load(sees + 2)
    step = tl.arange(0, KEYS)
    for first in range(0, tl.minimum(visible, n_selected), KEYS):
        slot = first + step
        entry = tl.load(selected + token * n_selected + slot, mask=slot < n_selected, other=-1)
        to = (place * n_heads + head) * n_slots + slot[None, :]
        seen = (entry >= 0)[None, :] & here
        weights = tl.load(tl.where(of_q, ds + to, p + to), mask=seen, other=0.0)
        sums = tl.dot(tl.trans(weights), x, input_precision="ieee")
        added = (entry >= 0)[:, None] & (col < D)
        if IN_ORDER:
            tl.store(grad + (place * n_selected + slot[:, None]) * D + col, sums, mask=added)
        else:
            to_entry = (row * n_entries + entry[:, None]) * D + col
            tl.atomic_add(grad + to_entry, sums, mask=added, sem="relaxed")
