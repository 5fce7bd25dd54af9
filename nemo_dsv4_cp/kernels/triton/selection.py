# SPDX-License-Identifier: Apache-2.0
"""Top-k selection as one operation: rotary, then scores and the best of them by chunks of rows.

DeepSeek-V4.1's is in ``shared_selection``, from the same launches.
"""

# B batch rows   L queries   I index heads   F index width   P entries   K selected entries
# r rotary dims

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from nemo_dsv4_cp.kernels.costs import Cost, register_cost
from nemo_dsv4_cp.kernels.triton import tiles
from nemo_dsv4_cp.kernels.triton.chunks import GROUP, Chunk, chunks_of
from nemo_dsv4_cp.kernels.triton.index_scores import index_scores_kernel
from nemo_dsv4_cp.kernels.triton.norm_rotate import padded, rotate_
from nemo_dsv4_cp.kernels.triton.top_k import bytes_read, top_k_kernel
from nemo_dsv4_cp.sequence.plan import NOTHING


@torch.library.custom_op("dsv4_cp::select_entries", mutates_args=("q",))
def select_entries_op(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, visible: torch.Tensor, topk: int, chunks: list[int],
) -> torch.Tensor:  # fmt: skip
    """Return int32 [B, L, min(topk, P)], ``NOTHING`` in unused slots, which come last.

    Args:
        q: Index queries before rotary [B, L, I, F], contiguous; rotated in place.
        weights: Float32 [B, L, I].
        keys: Index keys [B, P, F].
        cos: [B, L, r].
        sin: [B, L, r].
        visible: Int32 [B or 1, L, 2], the first entry that a query may see and one past the last.
        topk: K.
        chunks: Of :func:`score_chunks`.
    """
    rotate_(q, cos, sin)
    (batch, length, _, _), n_selected = q.shape, min(topk, keys.shape[1])
    selected = torch.full((batch, length, n_selected), NOTHING, dtype=torch.int32, device=q.device)
    for chunk in chunks_of(chunks):
        scores, maxima = score(q, weights, keys, visible, chunk, rounded=False)
        select(scores, maxima, visible, selected, chunk.begin, chunk.entry_begin)
    return selected


def score(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor,
    chunk: Chunk, *, rounded: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Score a chunk's queries against all entries that they see between them.

    Returns:
        Int32 [B, C, scores] from ``chunk.entry_begin`` on, and [B, C, scores / group]: the bits of
        what ``index_scores`` stores.
    """
    (batch, length, heads, width), rows, n_scores = q.shape, len(chunk), chunk.n_scores
    scores = visible.new_empty(batch, rows, n_scores)
    maxima = visible.new_empty(batch, rows, n_scores // chunk.group)
    tile, block_heads = tiles.of(tiles.INDEX_SCORES, q), padded(heads)
    queries, block_keys = max(1, tile.heads // block_heads), max(tile.keys, chunk.group)
    index_scores_kernel[triton.cdiv(n_scores, block_keys), triton.cdiv(rows, queries), batch](
        q, weights, keys, visible, scores, maxima, chunk.begin, length, rows, keys.shape[1],
        chunk.entry_begin, n_scores, visible.shape[0],
        HEADS=heads, BLOCK_HEADS=block_heads, F=width, BLOCK_F=padded(width), KEYS=block_keys,
        QUERIES=triton.next_power_of_2(queries), GROUP=chunk.group, ROUNDED=rounded,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return scores, maxima


def select(
    scores: torch.Tensor, maxima: torch.Tensor, bounds: torch.Tensor, selected: torch.Tensor,
    begin: int, first: int,
) -> None:  # fmt: skip
    """Put the best scores' places of the queries from ``begin`` on in ``selected`` [B, L, K].

    Args:
        scores: Int32 [B, C, scores].
        maxima: Int32 [B, C, groups].
        bounds: Int32 [B or 1, L, 2], the first place that a query may select and the end.
        selected: Int32 [B, L, K].
        begin: The first of the C queries among the L.
        first: The place of the first score.
    """
    (batch, rows, n_scores), n_selected = scores.shape, selected.shape[-1]
    group, groups = n_scores // maxima.shape[-1], triton.next_power_of_2(maxima.shape[-1])
    tile = tiles.of(tiles.TOP_K if group <= GROUP else tiles.TOP_K_OF_MANY, bounds)
    top_k_kernel[rows, batch](
        scores, maxima, bounds, selected, begin, bounds.shape[1], rows, first, n_scores,
        bounds.shape[0], n_selected,
        BLOCK_K=triton.next_power_of_2(n_selected), GROUPS=groups,
        STEP=min(tile.keys * GROUP // group, groups), GROUP=group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@select_entries_op.register_fake
def _(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, visible: torch.Tensor, topk: int, chunks: list[int],
) -> torch.Tensor:  # fmt: skip
    return visible.new_empty(*q.shape[:2], min(topk, keys.shape[1]))


@register_cost("dsv4_cp::select_entries")
def _(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, visible: torch.Tensor, topk: int, chunks: list[int],
) -> Cost:  # fmt: skip
    batch, length, heads, width = q.shape
    rotated = batch * length * heads * cos.shape[-1] * q.element_size()
    indices = 4 * batch * length * min(topk, keys.shape[1])
    launches, most = 2, 0
    read, written = rotated + 2 * batch * length * cos.shape[-1] * cos.element_size(), rotated
    for chunk in chunks_of(chunks):
        rows, scored = batch * (chunk.end - chunk.begin), chunk.n_scores
        # Scores: q, weights and keys to scores and maxima; then the best.
        launches, most = launches + 2, max(most, rows * chunk.score_bytes)
        read += rows * heads * (width * q.element_size() + 4)
        read += batch * (chunk.entry_end - chunk.entry_begin) * width * keys.element_size()
        read += rows * bytes_read(scored, chunk.group, topk)
        written += rows * chunk.score_bytes
    return Cost(launches, read, written + 2 * indices, scratch_bytes=most)


@register_flop_formula(torch.ops.dsv4_cp.select_entries)
def _(q: tuple[int, ...], *others: Any, **_: Any) -> int:
    heads, width = q[2:]
    chunks: list[int] = others[6]
    return 2 * heads * width * sum(chunk.seen for chunk in chunks_of(chunks))
