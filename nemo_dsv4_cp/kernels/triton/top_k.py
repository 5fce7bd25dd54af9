# SPDX-License-Identifier: Apache-2.0
"""The best scores of each row, exactly, ties by place; bound by latency, and reads little.

Scores are uint32 that sort like the floats; 0 is below every score. ``index_scores`` stores them,
and the maximum of each group of GROUP scores. One program handles one row, without atomics, so the
result is bitwise reproducible:

1. Find the K-th largest of the maxima. It is a lower bound of the K-th best score, because K groups
   have a score of at least this value. The search sets bits from the highest down, and keeps a bit
   if at least K numbers reach the value.
2. Find the exact K-th best score. Scores above the bound lie in groups whose maximum is above it,
   and there are fewer than K such groups. Load their scores into registers, and search among them
   in the same way. If fewer than K scores are above the bound, the bound is the K-th best score.
3. Take every score above it, and the first scores that equal it until there are K. If it is above
   the bound, all of these lie in the groups of step 2, whose numbers then replace the maxima in
   memory: go through this list. Otherwise, go through all groups whose maximum reaches the bound.
"""

# B batch rows   L local queries   P entries   K selected entries   C queries of a chunk

from __future__ import annotations

import triton
import triton.language as tl

from nemo_dsv4_cp.kernels.triton.tiles import COUNTERS

# Two counts travel in one cumulative sum: of what is above in the low bits, of ties from TIES on.
TIES = tl.constexpr(16)
LOW_BITS = tl.constexpr((1 << 16) - 1)


def bytes_read(n_scores: int, group: int, k: int) -> int:
    """Return what a row reads: the maxima, and twice of fewer than K groups number and scores."""
    groups = n_scores // group
    return 4 * (groups + 2 * min(groups, k) * (1 + group))


@triton.jit
def _kth(numbers, K):  # type: ignore[no-untyped-def]
    """Return the K-th largest of uint32 ``numbers``, 0 where fewer than K are above 0."""
    threshold = tl.full((), 0, tl.uint32)
    for place in range(32):
        higher = threshold | (tl.full((), 1, tl.uint32) << (31 - place))
        reached = tl.sum((numbers >= higher).to(tl.int32))
        threshold = tl.where(reached >= K, higher, threshold)
    return threshold


@triton.jit(do_not_specialize=COUNTERS)
def top_k_kernel(  # type: ignore[no-untyped-def]
    scores, maxima, visible, selected, first_query, n_queries, n_rows, first_entry, n_scores,
    visible_rows, K,
    BLOCK_K: tl.constexpr, GROUPS: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (C, B): places of the K best into ``selected`` [B, L, K], the rest of which is -1."""
    c, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query = first_query + c
    bounds = visible + ((row % visible_rows) * n_queries + query) * 2
    first, stop = tl.load(bounds), tl.load(bounds + 1)
    selected += (row * n_queries + query) * K
    slot = tl.arange(0, BLOCK_K)
    if stop - first <= K:
        tl.store(selected + slot, tl.where(slot < stop - first, first + slot, -1), slot < K)
        return
    first, stop = first - first_entry, stop - first_entry
    scores += (row * n_rows + c) * n_scores
    n_groups = n_scores // GROUP
    maxima += (row * n_rows + c) * n_groups
    first_group, last_group = first // GROUP, (stop - 1) // GROUP

    group = first_group + tl.arange(0, GROUPS)
    best = tl.load(maxima + group, mask=group <= last_group, other=0)
    best = best.to(tl.uint32, bitcast=True)
    bound = _kth(best, K)

    # Their numbers wait in the memory of the result: fewer than K.
    above = (best > bound).to(tl.int32)
    n_above = tl.sum(above)
    tl.store(selected + tl.cumsum(above) - 1, group, mask=above == 1)
    tl.debug_barrier()
    held = tl.load(selected + slot, mask=slot < n_above, other=0)
    of_held = held[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    in_range = (slot < n_above)[:, None] & (of_held >= first) & (of_held < stop)
    few = tl.load(scores + of_held, mask=in_range, other=0).to(tl.uint32, bitcast=True)
    threshold = tl.maximum(bound, _kth(few, K))
    lacking = K - tl.sum((few > threshold).to(tl.int32))

    listed, n_through = threshold > bound, last_group - first_group + 1
    if listed:
        n_through = n_above
        tl.store(maxima + slot, held, mask=slot < n_above)
    else:
        maxima += first_group
    tl.debug_barrier()
    n_taken, n_ties, begin = 0, 0, 0
    while (begin < n_through) & (n_taken + tl.minimum(n_ties, lacking) < K):
        nth = begin + tl.arange(0, STEP)
        stored = tl.load(maxima + nth, mask=nth < n_through, other=0)
        of = tl.where(listed, stored, first_group + nth)
        reaches = (nth < n_through) & (listed | (stored.to(tl.uint32, bitcast=True) >= threshold))
        place = tl.reshape(of[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (STEP * GROUP,))
        reached = tl.reshape(tl.broadcast_to(reaches[:, None], (STEP, GROUP)), (STEP * GROUP,))
        seen = reached & (place >= first) & (place < stop)
        x = tl.load(scores + place, mask=seen, other=0).to(tl.uint32, bitcast=True)
        higher, tie = seen & (x > threshold), seen & (x == threshold)
        both = higher.to(tl.int32) | (tie.to(tl.int32) << TIES)
        before = tl.cumsum(both) - both
        ties = n_ties + (before >> TIES)
        taken = higher | (tie & (ties < lacking))
        to = n_taken + (before & LOW_BITS) + tl.minimum(ties, lacking)
        tl.store(selected + to, first_entry + place, mask=taken)
        n_taken += tl.sum(higher.to(tl.int32))
        n_ties += tl.sum(tie.to(tl.int32))
        begin += STEP
