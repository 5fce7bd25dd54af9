# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss of queries and its gradients, from the target; bound by matrix products.

With weights a_i of heads, d_ij = q_i . k_j, target p (t over its sum), prediction m, and a weight w
of the query:

    s_j = sum_i a_i relu(d_ij),   m = softmax(s),   loss = w sum_j p_j (log p_j - log m_j)
    ds_j = m_j - p_j,   g_i = sum_j ds_j [d_ij > 0] k_j,   dq_i = w a_i g_i,   da_i = w q_i . g_i
    dk_j = sum over queries of w ds_j sum_i [d_ij > 0] a_i q_i

It must equal ``kernels/reference/indexer_loss.py``. ``gradients`` has a query with all its index
heads in a program, which walks the entries twice: for the sums of softmax and target, then for loss
and g; it stores ds. What is rounded for products are ds, and a_i q_i; the small factor w comes
afterwards, for float16 could not hold it. The gradient of keys needs their products with queries
once more: a kernel that sums g beside it spills. ``selected_keys`` adds what a query gives to its
selected keys, by atomics, or writes it out for a sum in order. ``index_keys`` sums the gradient of
a block of keys over the queries that see it, in order.
"""

# B batch rows   L local queries   C queries of the chunk   I index heads   F index width
# N attention heads   P entries   K selected entries   r rotary dims
# slots: K in blocks, or entries from entry_base on

from __future__ import annotations

import triton
import triton.language as tl

from nemo_dsv4_cp.kernels.triton.attention_backward import first_above
from nemo_dsv4_cp.kernels.triton.indexer_target import entries_in
from nemo_dsv4_cp.kernels.triton.norm_rotate import angles, turn
from nemo_dsv4_cp.kernels.triton.tiles import COUNTERS

LOWEST = tl.constexpr(-3e38)
TINY = tl.constexpr(1.1754944e-38)


@triton.jit
def _target_of(target, at, mask, n_slots, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load t, the sum of what each block of attention's heads gave."""
    total = tl.load(target + at, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(target + part * n_slots + at, mask=mask, other=0.0)
    return total


@triton.jit
def _rotated(  # type: ignore[no-untyped-def]
    q, weights, cos, sin, token, INDEX_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    F: tl.constexpr, ROTARY: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Return a query's heads, rotated, and their weights."""
    nth, col = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_F)[None, :]
    inside = (nth < INDEX_HEADS)[:, None] & (col < F)
    at = token * INDEX_HEADS * F + (nth[:, None] * F + col)
    x = tl.load(q + at, mask=inside, other=0.0).to(tl.float32)
    c, s = angles(cos, sin, token, F, ROTARY, BLOCK_F // 2)
    x = turn(x, c, s, BLOCK_HEADS, BLOCK_F // 2).to(q.dtype.element_ty)
    return x, tl.load(weights + token * INDEX_HEADS + nth, mask=nth < INDEX_HEADS, other=0.0)


@triton.jit(do_not_specialize=COUNTERS)
def gradients_kernel(  # type: ignore[no-untyped-def]
    q, weights, keys, cos, sin, token_weights, ranges, selected, target, sums, grad_q, grad_weights,
    grad_scores, rotated, begin, n_chunk, n_queries, n_heads, n_entries, n_selected, n_slots,
    entry_base, range_rows,
    INDEX_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, F: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_F: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Grid (C, B): loss and captured share [B, L, 2], gradients of queries and their weights.

    And ds, float32 [B, C, slots]; without ``SELECTED`` also rotated queries, as they are and
    weighted, [B, C, 2, I, F].
    """
    row = tl.program_id(1).to(tl.int64)
    query = begin + tl.program_id(0)
    token, place = row * n_queries + query, row * n_chunk + tl.program_id(0)
    nth, col = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_F)[None, :]
    of_head, whole = nth[:, None] * F + col, (nth < INDEX_HEADS)[:, None] & (col < F)
    x, a = _rotated(q, weights, cos, sin, token, INDEX_HEADS, BLOCK_HEADS, F, ROTARY, BLOCK_F)
    weight = tl.load(token_weights + token)
    sees = ranges + ((row % range_rows) * n_queries + query) * 4
    first, stop = tl.load(sees + 2), tl.load(sees + 3)
    keys += row * n_entries * F
    selected += token * n_selected
    target += place * PARTS * n_slots
    grad_scores += place * n_slots
    n_seen = tl.maximum(stop - first, 0)
    if SELECTED:
        n_seen = tl.minimum(n_seen, n_selected)
    else:
        target += first - entry_base
        grad_scores += first - entry_base
        to = rotated + place * 2 * INDEX_HEADS * F + of_head
        weighted = (x.to(tl.float32) * a[:, None]).to(x.dtype)
        tl.store(to, x, mask=whole)
        tl.store(to + INDEX_HEADS * F, weighted, mask=whole)

    step = tl.arange(0, KEYS)
    best, total = tl.full((KEYS,), LOWEST, tl.float32), tl.zeros((KEYS,), tl.float32)
    mass = tl.zeros((KEYS,), tl.float32)
    for begins in range(0, n_seen, KEYS):
        slot = begins + step
        entry, seen = entries_in(selected, slot, first, n_seen, SELECTED)
        k = tl.load(keys + entry[:, None] * F + col, mask=seen[:, None] & (col < F), other=0.0)
        dots = tl.dot(k, tl.trans(x), input_precision="ieee")
        scores = tl.sum(tl.maximum(dots, 0.0, tl.PropagateNan.ALL) * a[None, :], axis=1)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, scores)
        total = total * tl.exp(best - higher) + tl.exp(scores - higher)
        best = higher
        mass += _target_of(target, slot, seen, n_slots, PARTS)
    highest, all_mass = tl.max(best, axis=0), tl.sum(mass, axis=0)
    total = tl.sum(total * tl.exp(best - highest), axis=0)
    log_sum = highest + tl.log(tl.maximum(total, TINY, tl.PropagateNan.ALL))
    share = 1 / tl.maximum(all_mass, TINY, tl.PropagateNan.ALL)
    targeted = tl.where(all_mass < TINY, 0.0, 1.0)  # else window and sink have all; NaN stays

    loss = tl.zeros((KEYS,), tl.float32)
    acc = tl.zeros((BLOCK_HEADS, BLOCK_F), tl.float32)
    for begins in range(0, n_seen, KEYS):
        slot = begins + step
        entry, seen = entries_in(selected, slot, first, n_seen, SELECTED)
        k = tl.load(keys + entry[:, None] * F + col, mask=seen[:, None] & (col < F), other=0.0)
        dots = tl.dot(k, tl.trans(x), input_precision="ieee")
        scores = tl.sum(tl.maximum(dots, 0.0, tl.PropagateNan.ALL) * a[None, :], axis=1)
        p = _target_of(target, slot, seen, n_slots, PARTS) * share
        log_m = scores - log_sum
        ds = tl.where(seen, (tl.exp(log_m) - p) * targeted, 0.0)
        loss += p * (tl.log(tl.where(p == 0, 1.0, p)) - log_m) * targeted
        picked = tl.where(dots > 0, ds[:, None], 0.0).to(k.dtype)
        acc = tl.dot(tl.trans(picked), k, acc, input_precision="ieee")
        tl.store(grad_scores + slot, ds, mask=seen)

    captured = all_mass / n_heads
    if not SELECTED:
        found = tl.zeros((KEYS,), tl.float32)
        for begins in range(0, tl.minimum(n_seen, n_selected), KEYS):
            slot = begins + step
            entry = tl.load(selected + slot, mask=slot < n_selected, other=-1)
            found += _target_of(target, entry - first, entry >= 0, n_slots, PARTS)
        captured = tl.sum(found, axis=0) * share
    tl.store(sums + token * 2, weight * tl.sum(loss, axis=0))
    tl.store(sums + token * 2 + 1, weight * captured)
    to_weights = grad_weights + token * INDEX_HEADS + nth
    of_weights = tl.sum(x.to(tl.float32) * acc, axis=1) * weight
    tl.store(to_weights, of_weights, mask=nth < INDEX_HEADS)
    c, s = angles(cos, sin, token, F, ROTARY, BLOCK_F // 2)
    acc = turn(acc * (a * weight)[:, None], c, -s, BLOCK_HEADS, BLOCK_F // 2)
    to = grad_q + token * INDEX_HEADS * F + of_head
    tl.store(to, acc.to(grad_q.dtype.element_ty), mask=whole)


@triton.jit(do_not_specialize=COUNTERS)
def selected_keys_kernel(  # type: ignore[no-untyped-def]
    q, weights, keys, cos, sin, token_weights, ranges, selected, grad_scores, grad_keys, begin,
    n_chunk, n_queries, n_entries, n_selected, n_slots, range_rows,
    INDEX_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, F: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_F: tl.constexpr, KEYS: tl.constexpr, IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Grid (C, B): adds to ``grad_keys`` [B, P, F], or writes [B, C, K, F], float32."""
    row = tl.program_id(1).to(tl.int64)
    query = begin + tl.program_id(0)
    token, place = row * n_queries + query, row * n_chunk + tl.program_id(0)
    x, a = _rotated(q, weights, cos, sin, token, INDEX_HEADS, BLOCK_HEADS, F, ROTARY, BLOCK_F)
    weighted = (x.to(tl.float32) * a[:, None]).to(x.dtype)
    weight = tl.load(token_weights + token)
    sees = ranges + ((row % range_rows) * n_queries + query) * 4
    n_seen = tl.minimum(tl.load(sees + 3) - tl.load(sees + 2), n_selected)
    keys += row * n_entries * F
    grad_keys += (place * n_selected if IN_ORDER else row * n_entries) * F
    selected += token * n_selected
    grad_scores += place * n_slots
    col = tl.arange(0, BLOCK_F)[None, :]
    for begins in range(0, n_seen, KEYS):
        slot = begins + tl.arange(0, KEYS)
        entry, seen = entries_in(selected, slot, 0, n_seen, True)
        inside = seen[:, None] & (col < F)
        k = tl.load(keys + entry[:, None] * F + col, mask=inside, other=0.0)
        ds = tl.load(grad_scores + slot, mask=seen, other=0.0) * weight
        dots = tl.dot(k, tl.trans(x), input_precision="ieee")
        on = tl.where(dots > 0, 1.0, 0.0).to(k.dtype)
        added = tl.dot(on, weighted, input_precision="ieee") * ds[:, None]
        if IN_ORDER:
            tl.store(grad_keys + (slot[:, None] * F + col), added, mask=inside)
        else:
            to = grad_keys + (entry[:, None] * F + col)
            tl.atomic_add(to, added, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=COUNTERS)
def index_keys_kernel(  # type: ignore[no-untyped-def]
    rotated, keys, token_weights, ranges, grad_scores, grad_keys, begin, n_chunk, n_queries,
    n_entries, n_slots, entry_base, range_rows,
    INDEX_HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Grid (slots / KEYS, B): adds what a chunk gives to float32 [B, P, F]."""
    row = tl.program_id(1).to(tl.int64)
    block = entry_base + tl.program_id(0) * KEYS
    entry = block + tl.arange(0, KEYS)
    head, col = tl.arange(0, BLOCK_HEADS)[:, None], tl.arange(0, BLOCK_F)[None, :]
    of_head, whole = head * F + col, (head < INDEX_HEADS) & (col < F)
    of_keys = (row * n_entries + entry[:, None]) * F + col
    inside = (entry < n_entries)[:, None] & (col < F)
    k = tl.load(keys + of_keys, mask=inside, other=0.0)
    ranges += (row % range_rows) * n_queries * 4
    # A query sees entries [first, stop).
    low = first_above(ranges, 3, block, begin, begin + n_chunk)
    high = first_above(ranges, 2, block + KEYS - 1, begin, begin + n_chunk)
    acc = tl.zeros((KEYS, BLOCK_F), tl.float32)
    # Triton 3.4 takes no loop from what a search returns.
    for query in range(tl.maximum(low, begin), high):
        place = row * n_chunk + query - begin
        first, stop = tl.load(ranges + query * 4 + 2), tl.load(ranges + query * 4 + 3)
        seen = (entry >= first) & (entry < stop)
        ds = tl.load(grad_scores + place * n_slots + (entry - entry_base), mask=seen, other=0.0)
        of_query = rotated + place * 2 * INDEX_HEADS * F + of_head
        x = tl.load(of_query, mask=whole, other=0.0)
        weighted = tl.load(of_query + INDEX_HEADS * F, mask=whole, other=0.0)
        weight = tl.load(token_weights + row * n_queries + query)
        dots = tl.dot(k, tl.trans(x), input_precision="ieee")
        on = tl.where(dots > 0, 1.0, 0.0).to(k.dtype)
        added = tl.dot(on, weighted, input_precision="ieee")
        acc += added * (ds * weight)[:, None]
    tl.store(grad_keys + of_keys, tl.load(grad_keys + of_keys, mask=inside) + acc, mask=inside)
