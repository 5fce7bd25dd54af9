# SPDX-License-Identifier: Apache-2.0
"""What attention looks at, the target of the indexer's loss; bound by matrix products.

    s_hj = scale q_h . k_j,   Z_h = exp(sink_h) + sum_j exp(s_hj),   t_j = sum_h exp(s_hj) / Z_h

Z over window and entries, t of the entries alone. It must equal
``kernels/reference/indexer_loss.py`` before that divides t by its sum. The heads of one query are
the rows of the products, as in ``attention_forward``. A program normalizes and rotates its queries
itself: stored, they would take as much memory as attention's. It walks window and entries for
log Z, then the entries again: their scores of all heads would be 128 KiB per query, and reading
them back takes as long as a second product.
"""

# B batch rows   L local queries   C queries of the chunk   N heads   D head_dim   T raw keys
# P entries   K selected entries   r rotary dims   slots: K in blocks, or entries from entry_base on

from __future__ import annotations

import triton
import triton.language as tl

from nemo_dsv4_cp.kernels.triton.attention_forward import LOG2E
from nemo_dsv4_cp.kernels.triton.norm_rotate import angles, turn
from nemo_dsv4_cp.kernels.triton.tiles import COUNTERS


@triton.jit
def entries_in(selected, slot, first, n_seen, SELECTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the entries in slots of a query, and whether there is one."""
    if SELECTED:
        entry = tl.load(selected + slot, mask=slot < n_seen, other=-1)
        return entry, entry >= 0
    else:
        return first + slot, slot < n_seen


@triton.jit(do_not_specialize=COUNTERS)
def target_kernel(  # type: ignore[no-untyped-def]
    x, raw, entries, sinks, cos, sin, ranges, selected, target, begin, n_chunk, n_queries, n_heads,
    n_raw, n_entries, n_selected, n_slots, entry_base, range_rows, scale2, eps,
    D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
    KEYS: tl.constexpr, SELECTED: tl.constexpr,
):  # fmt: skip
    """Grid (C, N / HEADS, B): t of each block of heads, float32 [B, C, N / HEADS, slots]."""
    row = tl.program_id(2).to(tl.int64)
    query = begin + tl.program_id(0)
    token = row * n_queries + query
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    here = head < n_heads
    col = tl.arange(0, BLOCK_D)[None, :]
    inside = here[:, None] & (col < D)
    rows = tl.load(x + token * n_heads * D + (head[:, None] * D + col), mask=inside, other=0.0)
    rows = rows.to(tl.float32)
    rows *= tl.rsqrt(tl.sum(rows * rows, axis=1, keep_dims=True) / D + eps)
    c, s = angles(cos, sin, token, D, ROTARY, BLOCK_D // 2)
    q = turn(rows, c, s, HEADS, BLOCK_D // 2).to(x.dtype.element_ty)
    sees = ranges + ((row % range_rows) * n_queries + query) * 4
    raw_first, raw_last = tl.load(sees), tl.load(sees + 1)
    entry_first, entry_stop = tl.load(sees + 2), tl.load(sees + 3)
    raw += row * n_raw * D
    entries += row * n_entries * D
    place = (row * n_chunk + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    target += place * n_slots

    n_seen = tl.maximum(entry_stop - entry_first, 0)
    if SELECTED:
        n_seen = tl.minimum(n_seen, n_selected)
        selected += token * n_selected
    else:
        target += entry_first - entry_base
    best = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32) * LOG2E
    total = tl.full((HEADS,), 1.0, tl.float32)
    step = tl.arange(0, KEYS)
    raw_steps = tl.cdiv(tl.maximum(raw_last + 1 - raw_first, 0), KEYS)
    for i in range(0, raw_steps + tl.cdiv(n_seen, KEYS)):
        of_window = i < raw_steps
        slot = tl.where(of_window, i, i - raw_steps) * KEYS + step
        entry, is_entry = entries_in(
            selected, slot, entry_first, tl.where(of_window, 0, n_seen), SELECTED
        )
        at = tl.where(of_window, raw_first + slot, entry)
        seen = tl.where(of_window, at <= raw_last, is_entry)
        keys = tl.where(of_window, raw, entries)
        k = tl.load(keys + at[:, None] * D + col, mask=seen[:, None] & (col < D), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        total = total * tl.exp2(best - higher) + tl.sum(tl.exp2(scores - higher[:, None]), axis=1)
        best = higher
    log2_sum = best + tl.log2(total)
    for first in range(0, n_seen, KEYS):
        slot = first + step
        entry, seen = entries_in(selected, slot, entry_first, n_seen, SELECTED)
        k = tl.load(entries + entry[:, None] * D + col, mask=seen[:, None] & (col < D), other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        p = tl.where(here[:, None], tl.exp2(scores - log2_sum[:, None]), 0.0)
        tl.store(target + slot, tl.sum(p, axis=0), mask=seen)
