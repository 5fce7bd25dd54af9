# SPDX-License-Identifier: Apache-2.0
"""The indexer's loss as one operation, with its gradients.

Three launches per chunk of queries: the target, loss and gradients of queries, those of keys. Of
selected entries a chunk stores the target and ds, K numbers of each query: a step seldom has more
than one. Of all entries it stores as many as they are, so that chunks are short.
"""

# B batch rows   L queries   C queries of a chunk   I index heads   F index width   N heads
# D head_dim   T raw keys   P entries   K selected entries   r rotary dims

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from nemo_dsv4_cp.kernels.costs import Cost, register_cost
from nemo_dsv4_cp.kernels.triton import tiles
from nemo_dsv4_cp.kernels.triton.attention import add_in_order
from nemo_dsv4_cp.kernels.triton.attention_forward import LOG2E
from nemo_dsv4_cp.kernels.triton.chunks import Chunk, chunks_of, loss_bytes
from nemo_dsv4_cp.kernels.triton.indexer_gradients import (
    gradients_kernel,
    index_keys_kernel,
    selected_keys_kernel,
)
from nemo_dsv4_cp.kernels.triton.indexer_target import target_kernel
from nemo_dsv4_cp.kernels.triton.norm_rotate import padded

Tensors = tuple[torch.Tensor, ...]


@torch.library.custom_op("dsv4_cp::indexer_loss", mutates_args=())
def indexer_loss_op(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, index_cos: torch.Tensor,
    index_sin: torch.Tensor, token_weights: torch.Tensor, x: torch.Tensor, raw: torch.Tensor,
    entries: torch.Tensor, sinks: torch.Tensor, selected: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, ranges: torch.Tensor, chunks: list[int], window: int,
    scale: float, eps: float, full: bool, in_order: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return loss and captured share, float32 [2]; gradients of q, weights and keys.

    Args:
        q: Index queries before rotary [B, L, I, F], contiguous.
        weights: Float32 [B, L, I].
        keys: Index keys [B, P, F].
        index_cos: Of the index queries [B, L, r].
        index_sin: As ``index_cos``.
        token_weights: Float32 [B, L].
        x: Queries as projected [B, L, N, D], contiguous.
        raw: Raw keys [B, T, D].
        entries: Entries [B, P, D].
        sinks: [N].
        selected: Int32 [B, L, K], -1 in unused slots, which come last.
        cos: Of the queries [B, L, r].
        sin: As ``cos``.
        ranges: Int32 [B or 1, L, 4] of :meth:`AttentionPlan.visible_ranges`.
        chunks: Of :func:`loss_chunks`.
        window: W.
        scale: Score multiplier of attention.
        eps: Of the norm.
        full: Compare all visible entries, not the selected ones.
        in_order: Sum gradients of selected keys in order, without atomics.
    """
    batch, length, _, _ = q.shape
    sums = weights.new_empty(batch, length, 2)
    grad_q, grad_weights = torch.empty_like(q), torch.empty_like(weights)
    grad_keys = torch.zeros_like(keys, dtype=torch.float32)
    attended = x, raw, entries, sinks, cos, sin
    index = q, weights, keys, index_cos, index_sin, token_weights
    filled = sums, grad_q, grad_weights
    for chunk in chunks_of(chunks):
        target = _target(attended, ranges, selected, chunk, scale, eps, full)
        stored = _gradients(index, ranges, selected, target, filled, chunk, x.shape[2], full)
        if full:
            _sum_keys(keys, token_weights, ranges, stored, grad_keys, chunk)
        else:
            _sum_selected(index, ranges, selected, stored[0], grad_keys, chunk, in_order)
        del target, stored  # or the next chunk's would be there beside them
    return sums.sum(dim=(0, 1)), grad_q, grad_weights, grad_keys.to(keys.dtype, copy=False)


def target_parts(x: torch.Tensor) -> int:
    """Return in how many blocks of heads the target of queries [B, L, N, D] is summed."""
    return int(triton.cdiv(x.shape[2], _target_heads(x)))


def _target_heads(x: torch.Tensor) -> int:
    return min(tiles.of(tiles.TARGET, x).heads, padded(x.shape[2]))


def _slots(chunk: Chunk, selected: torch.Tensor, full: bool) -> tuple[int, int]:
    """Return for how many entries of a query numbers are stored, and the first entry."""
    slots = chunk.entry_slots(None if full else selected.shape[-1])
    return slots, chunk.entry_begin // tiles.ALIGNED * tiles.ALIGNED


def _target(
    attended: Tensors, ranges: torch.Tensor, selected: torch.Tensor, chunk: Chunk, scale: float,
    eps: float, full: bool,
) -> torch.Tensor:  # fmt: skip
    """Return attention's probabilities, float32 [B, C, parts, slots], the heads in parts."""
    x, raw, entries, sinks, cos, sin = attended
    (batch, length, heads, width), rows = x.shape, len(chunk)
    parts, (slots, first_entry) = target_parts(x), _slots(chunk, selected, full)
    target = x.new_empty(batch, rows, parts, slots, dtype=torch.float32)
    tile = tiles.of(tiles.TARGET, x)
    target_kernel[rows, parts, batch](
        x, raw, entries, sinks, cos, sin, ranges, selected, target, chunk.begin, rows, length,
        heads, raw.shape[1], entries.shape[1], selected.shape[-1], slots, first_entry,
        ranges.shape[0], scale * LOG2E.value, eps,
        D=width, ROTARY=cos.shape[-1], BLOCK_D=padded(width), HEADS=_target_heads(x),
        KEYS=tile.keys, SELECTED=not full, num_warps=tile.warps,
        num_stages=tile.stages_of(None if full else selected),
    )  # fmt: skip
    return target


def _gradients(
    index: Tensors, ranges: torch.Tensor, selected: torch.Tensor, target: torch.Tensor,
    filled: Tensors, chunk: Chunk, heads: int, full: bool,
) -> Tensors:  # fmt: skip
    """Fill a chunk's losses and gradients of queries; return ds and rotated queries.

    Ds is float32 [B, C, slots]; queries are as they are and weighted, [B, C, 2, I, F], with
    ``full``.
    """
    q, weights, keys, cos, sin, token_weights = index
    (batch, length, index_heads, width), rows = q.shape, len(chunk)
    slots, first_entry = _slots(chunk, selected, full)
    grad_scores = target.new_empty(batch, rows, slots)
    rotated = q.new_empty(batch, rows if full else 0, 2, index_heads, width)
    tile = tiles.of(tiles.INDEX_GRAD, q)
    gradients_kernel[rows, batch](
        q, weights, keys, cos, sin, token_weights, ranges, selected, target, *filled, grad_scores,
        rotated, chunk.begin, rows, length, heads, keys.shape[1], selected.shape[-1], slots,
        first_entry, ranges.shape[0],
        INDEX_HEADS=index_heads, BLOCK_HEADS=padded(index_heads), F=width, ROTARY=cos.shape[-1],
        BLOCK_F=padded(width), KEYS=tile.keys, PARTS=target.shape[2], SELECTED=not full,
        num_warps=tile.warps, num_stages=tile.stages_of(None if full else selected),
    )  # fmt: skip
    return grad_scores, rotated


def _sum_selected(
    index: Tensors, ranges: torch.Tensor, selected: torch.Tensor, grad_scores: torch.Tensor,
    grad: torch.Tensor, chunk: Chunk, in_order: bool,
) -> None:  # fmt: skip
    """Add what a chunk gives to the keys selected for its queries."""
    q, weights, keys, cos, sin, token_weights = index
    (batch, length, heads, width), rows, n_selected = q.shape, len(chunk), selected.shape[-1]
    to = grad.new_zeros(batch, rows, n_selected, width) if in_order else grad
    tile = tiles.of(tiles.SELECTED_INDEX_GRAD, q)
    selected_keys_kernel[rows, batch](
        q, weights, keys, cos, sin, token_weights, ranges, selected, grad_scores, to, chunk.begin,
        rows, length, keys.shape[1], n_selected, grad_scores.shape[-1], ranges.shape[0],
        INDEX_HEADS=heads, BLOCK_HEADS=padded(heads), F=width, ROTARY=cos.shape[-1],
        BLOCK_F=padded(width), KEYS=tile.keys, IN_ORDER=in_order,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if in_order:
        add_in_order(grad, to, selected, chunk)


def _sum_keys(
    keys: torch.Tensor, token_weights: torch.Tensor, ranges: torch.Tensor, stored: Tensors,
    grad: torch.Tensor, chunk: Chunk,
) -> None:  # fmt: skip
    """Add what a chunk gives to all keys that its queries see."""
    grad_scores, rotated = stored
    (batch, rows, _, heads, width), slots = rotated.shape, grad_scores.shape[-1]
    tile = tiles.of(tiles.INDEX_KEYS_GRAD, keys)
    index_keys_kernel[triton.cdiv(slots, tile.keys), batch](
        rotated, keys, token_weights, ranges, grad_scores, grad, chunk.begin, rows,
        token_weights.shape[1], keys.shape[1], slots,
        chunk.entry_begin // tiles.ALIGNED * tiles.ALIGNED, ranges.shape[0],
        INDEX_HEADS=heads, BLOCK_HEADS=padded(heads), F=width, BLOCK_F=padded(width),
        KEYS=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


@indexer_loss_op.register_fake
def _(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, ...]:
    contiguous = torch.contiguous_format
    grads = (torch.empty_like(each, memory_format=contiguous) for each in (q, weights, keys))
    return weights.new_empty(2), *grads


@register_cost("dsv4_cp::indexer_loss")
def _(
    q: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, index_cos: torch.Tensor,
    index_sin: torch.Tensor, token_weights: torch.Tensor, x: torch.Tensor, raw: torch.Tensor,
    entries: torch.Tensor, sinks: torch.Tensor, selected: torch.Tensor, cos: torch.Tensor,
    sin: torch.Tensor, ranges: torch.Tensor, chunks: list[int], window: int,
    scale: float, eps: float, full: bool, in_order: bool,
) -> Cost:  # fmt: skip
    batch, _, index_heads, width = q.shape
    parts, size, n_selected = target_parts(x), q.element_size(), selected.shape[-1]
    key_bytes, sums = keys.element_size(), 4 * keys.numel()
    rounded = key_bytes != 4
    # The sums of keys filled and rounded; what is known of each query summed.
    launches, read, written = 2 + rounded, sums * rounded, sums + keys.numel() * key_bytes * rounded
    queries = [q, weights, x, index_cos, index_sin, cos, sin, token_weights, selected]
    read += sum(each.numel() * each.element_size() for each in queries)
    written += q.numel() * size + 4 * weights.numel()
    most = 0
    for chunk in chunks_of(chunks):
        rows, (slots, _) = batch * len(chunk), _slots(chunk, selected, full)
        stored = loss_bytes(
            chunk, parts, index_heads * width * size, width, None if full else n_selected, in_order
        )
        most = max(most, rows * stored)
        seen = batch * (chunk.entry_end - chunk.entry_begin)
        compared = seen if full else min(seen, rows * n_selected)
        launches += 7 if in_order else 3
        # target: raw keys and entries to t. gradients: that and index keys, sums of keys to sums.
        read += batch * (chunk.raw_end - chunk.raw_begin) * raw.shape[-1] * raw.element_size()
        read += compared * (entries.shape[-1] * entries.element_size() + width * key_bytes)
        read += 2 * 4 * rows * parts * slots + 4 * compared * width
        written += 4 * rows * parts * slots + 4 * compared * width
        if full:  # ds and rotated queries to the keys
            again = 4 * rows * slots + 2 * rows * index_heads * width * size
            read, written = read + again, written + again
    # The rounded gradient, which comes last, may take the memory of the chunks.
    most = max(most - keys.numel() * key_bytes, 0) + sums if rounded else most
    return Cost(launches, read, written, scratch_bytes=most + 8 * weights.numel() // index_heads)


@register_flop_formula(torch.ops.dsv4_cp.indexer_loss)
def _(q: tuple[int, ...], *others: Any, **_: Any) -> int:
    """Of attention: scores of the window, of entries twice. Of the indexer: scores thrice, sums."""
    batch, (index_heads, width) = q[0], q[2:]
    x, selected, window, full = others[5], others[9], others[14], others[17]
    chunks: list[int] = others[13]
    products = 0
    for chunk in chunks_of(chunks):
        queries, entries = batch * len(chunk), chunk.seen
        if not full:
            entries = min(entries, queries * selected[-1])
        products += x[2] * x[3] * (queries * window + 2 * entries)
        products += index_heads * width * entries * 5
    return 2 * products
