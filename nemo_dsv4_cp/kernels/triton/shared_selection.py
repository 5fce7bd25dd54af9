# SPDX-License-Identifier: Apache-2.0
"""Top-k selection of DeepSeek-V4.1 as one operation, by chunks of rows.

All entries: two launches for each chunk, scores and the best of them. The layer that chooses
candidates adds two, the blocks' maxima and the best of these. Later layers score the entries of
candidates alone, two launches for each chunk and one more.
"""

# B batch rows   L queries   I index heads   F index width   P entries   K selected entries
# M candidate blocks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from nemo_dsv4_cp.kernels.costs import Cost, register_cost
from nemo_dsv4_cp.kernels.protocol import CandidateBlocks
from nemo_dsv4_cp.kernels.triton import tiles
from nemo_dsv4_cp.kernels.triton.candidates import (
    block_maxima_kernel,
    candidate_scores_kernel,
    entries_of_slots_kernel,
)
from nemo_dsv4_cp.kernels.triton.chunks import (
    BLOCK_GROUP,
    GROUP,
    Chunk,
    block_bytes,
    chunks_of,
    score_chunks,
    slot_bytes,
)
from nemo_dsv4_cp.kernels.triton.norm_rotate import padded
from nemo_dsv4_cp.kernels.triton.selection import score, select
from nemo_dsv4_cp.kernels.triton.top_k import bytes_read
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan

Shape = tuple[int, ...]

_SCORES = 2048
"""Scores per program of ``block_maxima``."""


@dataclass(frozen=True, eq=False)
class SharedSelection:
    """What the selections of a step have in common: those of all layers, or inside candidates.

    Attributes:
        visible: Int32 [B or 1, L, 2], see :func:`select_shared_op`.
        bounds: Int32 [B or 1, L, 2], see there.
        keep: Candidates kept of each query; 0 if no query sees more blocks, and all are candidates.
        size: Entries of a block.
        most: How many blocks a query sees at most.
        chunks: Of :func:`score_chunks`.
    """

    visible: torch.Tensor
    bounds: torch.Tensor
    keep: int
    size: int
    most: int
    chunks: list[int]

    @classmethod
    def of(
        cls, plan: AttentionPlan, blocks: CandidateBlocks | None, *,
        inside: bool, entries: int, batch: int, workspace_bytes: int, device: torch.device,
    ) -> SharedSelection:  # fmt: skip
        """Return it for layers of a plan: ``inside`` candidates, or among ``entries``."""
        options = blocks, inside, entries, batch, workspace_bytes
        return plan.queries.once(
            ("shared selection", plan.ratio, device, *options),
            lambda: cls._made(plan, *options, device),
        )

    @classmethod
    def _made(
        cls, plan: AttentionPlan, blocks: CandidateBlocks | None, inside: bool, entries: int,
        batch: int, workspace_bytes: int, device: torch.device,
    ) -> SharedSelection:  # fmt: skip
        first, stop = plan.queries.visible_entries(plan.ratio, device)
        longest = min(plan.queries.layout.longest_document // plan.ratio, entries)
        size, most = (1, 0) if blocks is None else (blocks.size, blocks.count(longest))
        keep = blocks.keep if blocks is not None and blocks.keep < most else 0
        seen, stored = (stop - first + size - 1) // size, _stored(keep, size, inside)
        if inside:  # the last block may lack entries; those that are not kept are whole
            seen = stop - first - (seen - keep).clamp(min=0) * size
        chunks = score_chunks(plan, batch=batch, workspace_bytes=workspace_bytes, stored=stored)
        bounds = torch.stack((torch.zeros_like(seen), seen), dim=-1).int()
        return cls(torch.stack((first, stop), dim=-1).int(), bounds, keep, size, most, chunks)

    def every_block(self, batch: int) -> torch.Tensor:
        """Return all blocks that each query sees as candidates, int32 [B, L, most]."""
        number = torch.arange(self.most, device=self.bounds.device, dtype=torch.int32)
        blocks = number.masked_fill(number >= self.bounds[..., 1:], NOTHING)
        return blocks.expand(batch, -1, -1)


def _stored(keep: int, size: int, inside: bool) -> Callable[[Chunk], int]:
    """Return what tells the bytes that scores and maxima take of an index query of a chunk."""
    if not keep:
        return lambda chunk: chunk.score_bytes
    return lambda chunk: slot_bytes(chunk, keep, size) if inside else block_bytes(chunk, size)


@torch.library.custom_op("dsv4_cp::select_shared", mutates_args=())
def select_shared_op(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, candidates: torch.Tensor | None,
    visible: torch.Tensor, bounds: torch.Tensor, topk: int, keep: int, size: int,
    chunks: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return int32 [B, L, min(topk, P)] entries and [B, L, keep] candidates, ``NOTHING`` last.

    Args:
        q: Index queries after rotary and quantization [B, L, I, F], contiguous.
        weights: [B, L, I], of the queries' dtype.
        keys: Index keys [B, P, F].
        candidates: Blocks to select in, int32 [B, L, M] as this operation returned them, all that a
            query sees or M; None to select among all visible entries.
        visible: Int32 [B or 1, L, 2], the first entry that a query may see and one past the last.
        bounds: Int32 [B or 1, L, 2], 0 and how many slots of candidates a query has; or 0 and how
            many blocks it sees.
        topk: K.
        keep: How many blocks to keep as candidates, 0 for none.
        size: Entries of a block.
        chunks: Of :func:`score_chunks`.
    """
    (batch, length, _, _), device = q.shape, q.device
    n_selected = min(topk, keys.shape[1])
    selected = torch.full((batch, length, n_selected), NOTHING, dtype=torch.int32, device=device)
    made = torch.full((batch, length, keep), NOTHING, dtype=torch.int32, device=device)
    for chunk in chunks_of(chunks):
        if candidates is not None:
            stored = _score_candidates(q, weights, keys, candidates, visible, bounds, size, chunk)
            select(*stored, bounds, selected, chunk.begin, 0)
            continue
        scores, maxima = score(q, weights, keys, visible, chunk, rounded=True)
        select(scores, maxima, visible, selected, chunk.begin, chunk.entry_begin)
        if keep:
            select(*_score_blocks(scores, visible, size, chunk), bounds, made, chunk.begin, 0)
    if candidates is not None and chunks:
        entries_of_slots_kernel[length, batch](
            selected, candidates, visible, length, candidates.shape[-1], visible.shape[0],
            n_selected, SIZE=size, BLOCK_K=triton.next_power_of_2(n_selected),
        )  # fmt: skip
    return selected, made


def _score_blocks(
    scores: torch.Tensor, visible: torch.Tensor, size: int, chunk: Chunk
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best scores of a chunk's blocks and their maxima, as :func:`score` does."""
    (batch, rows, n_scores), n_blocks = scores.shape, chunk.n_blocks(size)
    best = visible.new_empty(batch, rows, n_blocks)
    maxima = visible.new_empty(batch, rows, n_blocks // BLOCK_GROUP)
    block_size = triton.next_power_of_2(size)
    blocks = max(BLOCK_GROUP, _SCORES // block_size)
    block_maxima_kernel[rows, triton.cdiv(n_blocks, blocks), batch](
        scores, visible, best, maxima, chunk.begin, visible.shape[1], rows, chunk.entry_begin,
        n_scores, n_blocks, visible.shape[0],
        SIZE=size, BLOCK_SIZE=block_size, BLOCKS=blocks, GROUP=BLOCK_GROUP,
    )  # fmt: skip
    return best, maxima


def _score_candidates(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, candidates: torch.Tensor,
    visible: torch.Tensor, slots: torch.Tensor, size: int, chunk: Chunk,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the scores of a chunk's slots and their maxima, as :func:`score` does."""
    (batch, length, heads, width), rows = q.shape, len(chunk)
    n_scores = chunk.n_slots(candidates.shape[-1], size)
    scores = visible.new_empty(batch, rows, n_scores)
    maxima = visible.new_empty(batch, rows, n_scores // GROUP)
    tile = tiles.of(tiles.CANDIDATE_SCORES, q)
    candidate_scores_kernel[rows, batch](
        q, weights, keys, candidates, visible, slots, scores, maxima, chunk.begin, length, rows,
        keys.shape[1], candidates.shape[-1], n_scores, visible.shape[0],
        HEADS=heads, BLOCK_HEADS=padded(heads), F=width, BLOCK_F=padded(width), SIZE=size,
        KEYS=tile.keys, GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return scores, maxima


@select_shared_op.register_fake
def _(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, candidates: torch.Tensor | None,
    visible: torch.Tensor, bounds: torch.Tensor, topk: int, keep: int, size: int,
    chunks: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rows = q.shape[:2]
    return visible.new_empty(*rows, min(topk, keys.shape[1])), visible.new_empty(*rows, keep)


def _shared_cost(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, candidates: torch.Tensor | None,
    visible: torch.Tensor, bounds: torch.Tensor, topk: int, keep: int, size: int,
    chunks: list[int],
) -> Cost:  # fmt: skip
    batch, length, heads, width = q.shape
    indices = 4 * batch * length * (min(topk, keys.shape[1]) + keep)
    launches, most = 1 + (keep > 0), 0
    read, written = 0, 2 * indices  # filled, and then selected
    for chunk in chunks_of(chunks):
        rows, entries = batch * len(chunk), chunk.entry_end - chunk.entry_begin
        scored, stored, group = chunk.n_scores, chunk.score_bytes, chunk.group
        launches += 2
        if candidates is not None:  # an entry is read for each query that has it
            of_candidates = candidates.shape[-1]
            scored, group = chunk.n_slots(of_candidates, size), GROUP
            stored = slot_bytes(chunk, of_candidates, size)
            entries = rows * scored // batch
            read += 4 * rows * of_candidates
        # As in ``select_entries``: q, weights and keys to scores and maxima; the best.
        read += rows * heads * (width + 1) * q.element_size()
        read += batch * entries * width * keys.element_size()
        read += rows * bytes_read(scored, group, topk)
        if keep:  # scores to blocks' maxima; the best
            launches, blocks = launches + 2, chunk.n_blocks(size)
            stored = block_bytes(chunk, size)
            read += 4 * rows * scored
            read += rows * bytes_read(blocks, BLOCK_GROUP, keep)
        written += rows * stored
        most = max(most, rows * stored)
    if candidates is not None and chunks:  # slots to entries, in place
        launches, read, written = launches + 1, read + 2 * indices, written + indices
    return Cost(launches, read, written, scratch_bytes=most)


def _shared_flops(
    q: Shape, weights: Any, keys: Any, candidates: Shape | None,
    visible: Any, bounds: Any, topk: int, keep: int, size: int, chunks: list[int],
    *_: Any, **__: Any,
) -> int:  # fmt: skip
    batch, (heads, width), scored = q[0], q[2:], 0
    for chunk in chunks_of(chunks):
        slots = None if candidates is None else batch * len(chunk) * candidates[-1] * size
        scored += chunk.seen if slots is None else min(chunk.seen, slots)
    return 2 * heads * width * scored


register_cost("dsv4_cp::select_shared")(_shared_cost)
register_flop_formula(torch.ops.dsv4_cp.select_shared)(_shared_flops)
