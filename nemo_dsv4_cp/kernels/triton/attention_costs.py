# SPDX-License-Identifier: Apache-2.0
"""What the attention operations cost: floating-point operations, launches and bytes.

A kernel is counted as reading and writing each of its tensors once, or of a chunk what that chunk
sees: what caches save, and what gathered rows read again, is not in it.
"""

# B batch rows   L local queries   N heads   D head_dim   T raw keys   P entries
# K selected entries

from __future__ import annotations

from typing import Any

import torch

from nemo_dsv4_cp.kernels.costs import Cost
from nemo_dsv4_cp.kernels.triton.chunks import backward_bytes, chunks_of, raw_slots

Shape = tuple[int, ...]


def _products(x: Shape, selected: Shape | None, chunks: list[int], window: int) -> int:
    """Return the operations of one product of queries and keys: 2 D per head and key.

    Keys are those of the whole window and, of entries, those that each query sees, or K.
    """
    batch, _, heads, width = x
    keys = 0
    for chunk in chunks_of(chunks):
        queries, entries = batch * (chunk.end - chunk.begin), chunk.seen
        if selected is not None:
            entries = min(entries, queries * selected[-1])
        keys += queries * window + entries
    return 2 * heads * width * keys


def forward_flops(
    x: Shape, raw: Shape, entries: Shape, sinks: Shape, selected: Shape | None,
    cos: Shape, sin: Shape, ranges: Shape, chunks: list[int], window: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Return the floating-point operations of the products in forward, two."""
    return 2 * _products(x, selected, chunks, window)


def backward_flops(
    grad: Shape, x: Shape, raw: Shape, entries: Shape, sinks: Shape, selected: Shape | None,
    cos: Shape, sin: Shape, ranges: Shape, out: Shape, lse: Shape,
    chunks: list[int], window: int, *_: Any, **__: Any,
) -> int:  # fmt: skip
    """Return the floating-point operations of the products in backward, five."""
    return 5 * _products(x, selected, chunks, window)


def _bytes(*tensors: torch.Tensor | None) -> int:
    return sum(0 if t is None else t.numel() * t.element_size() for t in tensors)


def forward_cost(
    x: torch.Tensor, raw: torch.Tensor, entries: torch.Tensor, sinks: torch.Tensor,
    selected: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, ranges: torch.Tensor,
    chunks: list[int], window: int, scale: float, eps: float | None, *_: Any,
) -> Cost:  # fmt: skip
    """Return what ``attend`` launches, reads, writes and allocates."""
    queries, angles = _bytes(x), _bytes(cos, sin)
    lse = x.numel() // x.shape[-1] * 4
    copies = eps is None
    rotated = (1 + copies) * queries * cos.shape[-1] // x.shape[-1]
    return Cost(
        # Norm and rotary, or a copy and rotary; attention; rotary back of the last dims.
        launches=3 + copies,
        read_bytes=2 * (queries + angles) + rotated + _bytes(raw, entries, sinks, selected, ranges),
        written_bytes=2 * queries + rotated + lse,
        scratch_bytes=0,
    )


def backward_cost(
    grad: torch.Tensor, x: torch.Tensor, raw: torch.Tensor, entries: torch.Tensor,
    sinks: torch.Tensor, selected: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
    ranges: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, chunks: list[int], window: int,
    scale: float, eps: float | None, in_order: bool, grad_entries: torch.Tensor | None = None,
) -> Cost:  # fmt: skip
    """Return what ``attend_backward`` launches, reads, writes and allocates.

    With ``grad_entries``, the sum that other layers share, ``attend_backward_adding``.
    """
    batch, _, heads, width = x.shape
    size, n_selected = x.element_size(), None if selected is None else selected.shape[-1]
    own = (raw,) if grad_entries is not None else (raw, entries)
    sums = 4 * sum(keys.numel() for keys in own)
    rounded = raw.element_size() != 4
    launches = len(own) * (1 + rounded)
    read, written = sums * rounded, sums
    most = 0
    for chunk in chunks_of(chunks):
        rows = batch * (chunk.end - chunk.begin)
        queries = rows * heads * width * size
        of_raw = 2 * rows * heads * raw_slots(window) * size
        of_entries = 2 * rows * heads * chunk.entry_slots(n_selected) * size
        launches += 4
        stored = backward_bytes(chunk, heads, width, window, n_selected, size, in_order)
        most = max(most, rows * stored)
        raw_rows = batch * (chunk.raw_end - chunk.raw_begin) * width
        entry_rows = batch * (chunk.entry_end - chunk.entry_begin) * width
        if n_selected is not None:
            entry_rows = min(entry_rows, rows * n_selected * width)
        # ready: x, out, grad to q, do. scores: those and keys to p, ds.
        read += 3 * queries + 2 * queries + (raw_rows + entry_rows) * size
        written += 2 * queries + of_raw + of_entries
        # keys: q, do, p, ds, sums to sums. queries: ds of the window and of entries, keys to dq.
        read += 2 * queries + of_raw + 4 * raw_rows
        written += 4 * raw_rows
        read += rows * heads * window * size + of_entries // 2
        read += (raw_rows + entry_rows) * size
        written += queries
        if not entry_rows:
            continue
        if n_selected is not None:
            launches += 4 if in_order else 1
            read += 2 * queries
        read += of_entries + 4 * entry_rows
        written += 4 * entry_rows
        if chunk.parts > 1:  # written by keys, read by sum_parts
            launches += 1
            parts = 4 * batch * chunk.parts * chunk.entry_slots(None) * width
            read, written = read + parts, written + parts
    # The sum of the sinks' gradients, one per log Z; the norm's backward or rotary back, in place.
    launches += 2 + (sinks.element_size() != 4)
    read, written = read + 2 * _bytes(lse), written + 2 * _bytes(lse)
    if eps is None:
        rotated = _bytes(x) * cos.shape[-1] // x.shape[-1]
        read, written = read + rotated + _bytes(cos, sin), written + rotated
    else:
        read, written = read + _bytes(x, x), written + _bytes(x)
    # The rounded gradients, which come last, may take the memory of the chunks.
    most = max(most - _bytes(*own), 0) + sums if rounded else most
    return Cost(launches, read, written, scratch_bytes=most + 2 * _bytes(lse))
