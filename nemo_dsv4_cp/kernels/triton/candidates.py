# SPDX-License-Identifier: Apache-2.0
"""Candidate blocks of DeepSeek-V4.1's top-k selection: which they are, and scores inside them.

Block b of a query holds entries [b size, (b + 1) size) that it may see, counted from the first one.
``block_maxima`` takes the maxima of stored scores, which ``top_k`` ranks as it ranks entries, the
block of the last entry first; it is bound by bytes. ``candidate_scores`` scores the entries of
candidates alone: a program walks the blocks of its query, whose keys it gathers, and stores scores
as ``index_scores`` does, in the order of the candidates; it is bound by the gathered bytes, 256 of
a key for 32 heads. It must equal ``kernels/reference/two_level_selection.py``.

``top_k`` stores blocks in ascending order. So the entries of candidates are in order too, ties
among them go by place, and only the last block may lack entries: those that a query may see are
the first ones, its slots.
"""

# B batch rows   L local queries   I index heads   F index width   P entries   C queries of a chunk
# K selected entries   M candidate blocks

from __future__ import annotations

import triton
import triton.language as tl

from nemo_dsv4_cp.kernels.triton.index_scores import in_order, sum_heads
from nemo_dsv4_cp.kernels.triton.tiles import COUNTERS

HIGHEST = tl.constexpr(0xFFFFFFFF)


@triton.jit(do_not_specialize=COUNTERS)
def block_maxima_kernel(  # type: ignore[no-untyped-def]
    scores, visible, best, maxima, first_query, n_queries, n_rows, first_entry, n_scores, n_blocks,
    visible_rows,
    SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (C, n_blocks / BLOCKS, B): the best scores of blocks [B, C, n_blocks], and maxima.

    The block of the last entry gets the highest score; what a query has no block for may not be
    written.
    """
    row = tl.program_id(2).to(tl.int64)
    bounds = visible + ((row % visible_rows) * n_queries + first_query + tl.program_id(0)) * 2
    first, stop = tl.load(bounds), tl.load(bounds + 1)
    count = tl.cdiv(stop - first, SIZE)
    if tl.program_id(1) * BLOCKS >= count:
        return
    to = row * n_rows + tl.program_id(0)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    nth = tl.arange(0, BLOCK_SIZE)[None, :]
    place = block[:, None] * SIZE + nth
    seen = (nth < SIZE) & (place < stop - first)
    x = tl.load(scores + to * n_scores + (first - first_entry) + place, mask=seen, other=0)
    highest = tl.max(x.to(tl.uint32, bitcast=True), axis=1)
    highest = tl.where(block == count - 1, tl.full((), HIGHEST, tl.uint32), highest)
    tl.store(best + to * n_blocks + block, highest.to(tl.int32, bitcast=True), block < n_blocks)
    of_groups = tl.max(tl.reshape(highest, (BLOCKS // GROUP, GROUP)), axis=1)
    group = tl.program_id(1) * (BLOCKS // GROUP) + tl.arange(0, BLOCKS // GROUP)
    n_groups = n_blocks // GROUP
    tl.store(maxima + to * n_groups + group, of_groups.to(tl.int32, bitcast=True), group < n_groups)


@triton.jit(do_not_specialize=COUNTERS)
def candidate_scores_kernel(  # type: ignore[no-untyped-def]
    q, weights, keys, candidates, visible, slots, scores, maxima, first_query, n_queries, n_rows,
    n_entries, n_candidates, n_scores, visible_rows,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr,
    SIZE: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (C, B): scores [B, C, n_scores] of the slots of each query of a chunk, and maxima."""
    c, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query = first_query + c
    token, of_query = row * n_queries + query, ((row % visible_rows) * n_queries + query) * 2
    first, n_slots = tl.load(visible + of_query), tl.load(slots + of_query + 1)
    head, col = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_F)[None, :]
    whole = (head[:, None] < HEADS) & (col < F)
    x = tl.load(q + token * HEADS * F + (head[:, None] * F + col), mask=whole, other=0.0)
    w = tl.load(weights + token * HEADS + head, mask=head < HEADS, other=0.0)
    candidates += token * n_candidates
    keys += (row * n_entries + first) * F
    to, n_groups = row * n_rows + c, n_scores // GROUP
    for begin in range(0, n_slots, KEYS):
        slot = begin + tl.arange(0, KEYS)
        used = slot < n_slots
        block = tl.load(candidates + slot // SIZE, mask=used, other=0)
        entry = block * SIZE + slot % SIZE
        k = tl.load(keys + entry[:, None] * F + col, mask=used[:, None] & (col < F), other=0.0)
        products = tl.dot(k, tl.trans(x), input_precision="ieee")
        ordered = in_order(sum_heads(products, w, q.dtype.element_ty, True))
        ordered = tl.where(used, ordered, 0)
        tl.store(scores + to * n_scores + slot, ordered.to(tl.int32, bitcast=True), slot < n_scores)
        best = tl.max(tl.reshape(ordered, (KEYS // GROUP, GROUP)), axis=1)
        group = begin // GROUP + tl.arange(0, KEYS // GROUP)
        tl.store(maxima + to * n_groups + group, best.to(tl.int32, bitcast=True), group < n_groups)


@triton.jit(do_not_specialize=COUNTERS)
def entries_of_slots_kernel(  # type: ignore[no-untyped-def]
    selected, candidates, visible, n_queries, n_candidates, visible_rows, K,
    SIZE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (L, B): slots in ``selected`` [B, L, K] become entries; the unused stay -1."""
    query, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(visible + ((row % visible_rows) * n_queries + query) * 2)
    token = row * n_queries + query
    nth = tl.arange(0, BLOCK_K)
    slot = tl.load(selected + token * K + nth, mask=nth < K, other=-1)
    used = slot >= 0
    block = tl.load(candidates + token * n_candidates + slot // SIZE, mask=used, other=0)
    tl.store(selected + token * K + nth, first + block * SIZE + slot % SIZE, mask=used)
