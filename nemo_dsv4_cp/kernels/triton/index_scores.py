# SPDX-License-Identifier: Apache-2.0
"""Scores of index queries against index keys, ready to be ranked; bound by matrix products.

    score_p = sum_i weight_i relu(q_i . k_p)

It must equal ``kernels/reference/torch_kernels.py``, and with ``ROUNDED``, DeepSeek-V4.1's way,
``kernels/reference/two_level_selection.py``: products, weighted products and sums are rounded to
the dtype of the queries. A program holds a block of keys and loops over
neighboring queries. One product multiplies the keys with all heads of a query, and the heads are
summed in registers, so memory holds one score per query and key, not one per head.

Scores are stored as uint32 that sort like the floats; 0 is below every score. For each group of
GROUP keys, the kernel also stores the largest score that the query may see. ``top_k`` reads these
maxima first, and then only the scores of groups that can hold one of the K best.
"""

# B batch rows   L local queries   I index heads   F index width   P entries   C queries of a chunk

from __future__ import annotations

import triton
import triton.language as tl

from nemo_dsv4_cp.kernels.triton.tiles import COUNTERS


@triton.jit
def in_order(scores):  # type: ignore[no-untyped-def]
    """Return uint32 in the order of float32 scores, -0.0 as 0.0."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    turned = tl.where(bits < 0, bits ^ -1, bits ^ -0x80000000)
    return turned.to(tl.uint32, bitcast=True)


@triton.jit
def sum_heads(products, w, dtype: tl.constexpr, ROUNDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the scores [KEYS] from the products with all heads [KEYS, HEADS]."""
    if ROUNDED:
        products = tl.maximum(products.to(dtype).to(tl.float32), 0.0, tl.PropagateNan.ALL)
        products = (products * w.to(tl.float32)[None, :]).to(dtype).to(tl.float32)
        return tl.sum(products, axis=1).to(dtype).to(tl.float32)
    else:
        return tl.sum(tl.maximum(products, 0.0, tl.PropagateNan.ALL) * w[None, :], axis=1)


@triton.jit(do_not_specialize=COUNTERS)
def index_scores_kernel(  # type: ignore[no-untyped-def]
    q, weights, keys, visible, scores, maxima, first_query, n_queries, n_rows, n_entries,
    first_entry, n_scores, visible_rows,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr,
    KEYS: tl.constexpr, QUERIES: tl.constexpr, GROUP: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Grid (n_scores / KEYS, C / QUERIES, B): scores [B, C, n_scores] of a chunk, and maxima.

    What no query of a block of keys may see is not written; entries beyond P get some score too.
    """
    row = tl.program_id(2).to(tl.int64)
    visible += (row % visible_rows) * n_queries * 2
    begin = tl.program_id(1) * QUERIES
    end = tl.minimum(begin + QUERIES, n_rows)
    several = begin + tl.arange(0, QUERIES)
    bounds = visible + (first_query + several) * 2
    starts = tl.load(bounds, mask=several < end, other=0)
    stops = tl.load(bounds + 1, mask=several < end, other=0)
    at = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    entry = first_entry + at
    block = first_entry + tl.program_id(0) * KEYS
    touched = (starts < block + KEYS) & (stops > tl.maximum(block, starts))
    if tl.max(touched.to(tl.int32)) == 0:
        return
    col = tl.arange(0, BLOCK_F)
    inside = (entry[:, None] < n_entries) & (col[None, :] < F)
    k = tl.load(
        keys + row * n_entries * F + (entry[:, None] * F + col[None, :]), mask=inside, other=0.0
    )
    head = tl.arange(0, BLOCK_HEADS)
    group = tl.program_id(0) * (KEYS // GROUP) + tl.arange(0, KEYS // GROUP)
    whole = (head[:, None] < HEADS) & (col[None, :] < F)
    for c in range(begin, end):
        query = first_query + c
        token = row * n_queries + query
        x = tl.load(q + token * HEADS * F + (head[:, None] * F + col[None, :]), whole, other=0.0)
        w = tl.load(weights + token * HEADS + head, mask=head < HEADS, other=0.0)
        products = tl.dot(k, tl.trans(x), input_precision="ieee")
        score = sum_heads(products, w, q.dtype.element_ty, ROUNDED)
        ordered = in_order(score)
        first, stop = tl.load(visible + query * 2), tl.load(visible + query * 2 + 1)
        to = row * n_rows + c
        tl.store(scores + to * n_scores + at, ordered.to(tl.int32, bitcast=True), at < n_scores)
        seen = tl.where((entry >= first) & (entry < stop), ordered, 0)
        best = tl.max(tl.reshape(seen, (KEYS // GROUP, GROUP)), axis=1)
        n_groups = n_scores // GROUP
        tl.store(maxima + to * n_groups + group, best.to(tl.int32, bitcast=True), group < n_groups)
