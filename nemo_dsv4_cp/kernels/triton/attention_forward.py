# SPDX-License-Identifier: Apache-2.0
"""Attention of a query's heads over its window and its entries; bound by matrix products.

    s_j = scale q . k_j,   Z = exp(sink) + sum_j exp(s_j),   o = sum_j exp(s_j) / Z k_j

It must equal ``kernels/reference/attention.py``, log Z included. The heads of one query are the
rows of both products, for they share keys: a program walks the keys of its query once, window
first, with the running maximum and sum of online softmax, begun with the sink. It reads in
``ranges`` which keys those are; there are no positions and no masks. Everything is in powers of
two. One loop walks window and entries: two would need twice the code, and drain their copies twice.
"""

# B batch rows   L local queries   N heads   D head_dim   T raw keys   P entries
# K selected entries

from __future__ import annotations

import triton
import triton.language as tl

from nemo_dsv4_cp.kernels.triton.tiles import COUNTERS

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=COUNTERS)
def forward_kernel(  # type: ignore[no-untyped-def]
    q, raw, entries, sinks, ranges, selected, out, lse, n_queries, n_heads, n_raw, n_entries,
    n_selected, range_rows, scale2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    SELECTED: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """Grid (L, N / HEADS, B). ``out`` may be the memory of ``q``."""
    query, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = row * n_queries + query
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, BLOCK_D)[None, :]
    inside = (head[:, None] < n_heads) & (col < D)
    x = tl.load(q + token * n_heads * D + (head[:, None] * D + col), mask=inside, other=0.0)
    sees = ranges + ((row % range_rows) * n_queries + query) * 4
    raw_first, raw_last = tl.load(sees), tl.load(sees + 1)
    entry_first, entry_stop = tl.load(sees + 2), tl.load(sees + 3)
    raw += row * n_raw * D
    entries += row * n_entries * D

    best = tl.load(sinks + head, mask=head < n_heads, other=0.0).to(tl.float32) * LOG2E
    total = tl.full((HEADS,), 1.0, tl.float32)
    acc = tl.zeros((HEADS, BLOCK_D), tl.float32)
    step = tl.arange(0, KEYS)
    raw_steps = tl.cdiv(tl.maximum(raw_last + 1 - raw_first, 0), KEYS)
    n_seen = tl.maximum(entry_stop - entry_first, 0)
    if SELECTED:
        n_seen = tl.minimum(n_seen, n_selected)
        selected += token * n_selected
    steps = raw_steps + tl.cdiv(n_seen, KEYS)
    for i in range(0, steps):
        of_window = i < raw_steps
        slot = tl.where(of_window, i, i - raw_steps) * KEYS + step
        if SELECTED:
            used = (i >= raw_steps) & (slot < n_selected)
            entry = tl.load(selected + slot, mask=used, other=-1)
            at = tl.where(of_window, raw_first + slot, entry)
            seen = tl.where(of_window, at <= raw_last, entry >= 0)
        else:
            at = tl.where(of_window, raw_first, entry_first) + slot
            seen = at < tl.where(of_window, raw_last + 1, entry_stop)
        keys = tl.where(of_window, raw, entries)
        k = tl.load(keys + at[:, None] * D + col, mask=seen[:, None] & (col < D), other=0.0)
        # On sm_90 Triton gives a product that reaches another in one region to both warp groups
        # whole. A branch, always taken and gone in the binary, keeps them apart: 32 wgmma m64n16
        # per step of 32 keys; 64 are twice the work. Softmax stays inside, or s is copied.
        if (i < steps) | (not BRANCH):
            s = tl.dot(x, tl.trans(k), input_precision="ieee") * scale2
            s = tl.where(seen[None, :], s, float("-inf"))
            higher = tl.maximum(best, tl.max(s, axis=1))
            shrink = tl.exp2(best - higher)
            w = tl.exp2(s - higher[:, None])
            total = total * shrink + tl.sum(w, axis=1)
            p = w.to(k.dtype)
        else:
            higher, shrink = best, best
            p = tl.zeros((HEADS, KEYS), k.dtype)
        best = higher
        acc = tl.dot(p, k, acc * shrink[:, None], input_precision="ieee")
    acc = acc / total[:, None]
    to = (token * n_heads + head[:, None]) * D + col
    tl.store(out + to, acc.to(out.dtype.element_ty), mask=(head[:, None] < n_heads) & (col < D))
    log_sum = (best + tl.log2(total)) / LOG2E
    tl.store(lse + token * n_heads + head, log_sum, mask=head < n_heads)
