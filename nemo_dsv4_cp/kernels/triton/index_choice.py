# SPDX-License-Identifier: Apache-2.0
"""The index choice as one operation: rotary, then scores and the best of them by chunks of rows."""

# B batch rows   L queries   I index heads   F index width   P entries   K chosen entries
# r rotary dims

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from nemo_dsv4_cp.kernels.costs import Cost, tell
from nemo_dsv4_cp.kernels.triton.index_scores import GROUP, score_into
from nemo_dsv4_cp.kernels.triton.norm_rotate import rotate_
from nemo_dsv4_cp.kernels.triton.top_k import choose_into
from nemo_dsv4_cp.sequence.plan import NOTHING
from nemo_dsv4_cp.sequence.queries import Queries


@dataclass(frozen=True)
class Chunk:
    """Queries [begin, end) and the entries that they see: between them, and one by one in all."""

    begin: int
    end: int
    entry_begin: int
    entry_end: int
    seen: int

    @property
    def scores(self) -> int:
        """How many scores a query has room for, whole groups."""
        return -(-(self.entry_end - self.entry_begin) // GROUP) * GROUP


_FIELDS = len(fields(Chunk))


def _chunks_of(numbers: list[int]) -> Iterator[Chunk]:
    for i in range(0, len(numbers), _FIELDS):
        yield Chunk(*numbers[i : i + _FIELDS])


def _bytes_per_query(chunk: Chunk) -> int:
    return 4 * (chunk.scores + chunk.scores // GROUP)


def score_chunks(queries: Queries, ratio: int, *, batch: int, workspace_bytes: int) -> list[int]:
    """Cut the queries so that the scores of a chunk fit the workspace, one query the least.

    Returns:
        The fields of :class:`Chunk` for each; queries that see nothing are in none.
    """
    chunks: list[int] = []
    length, begin = len(queries), 0
    while begin < length:
        rows = length - begin
        while True:
            chosen_for = slice(begin, begin + rows)
            span = queries.entry_span(chosen_for, ratio)
            seen = queries.entries_seen(chosen_for, ratio, batch=batch)
            chunk = Chunk(begin, begin + rows, span.start, span.stop, seen)
            fitting = max(1, workspace_bytes // max(1, batch * _bytes_per_query(chunk)))
            if rows <= fitting:
                break
            # Fewer queries may see fewer entries, and then more of them fit.
            rows = max(fitting, rows // 2)
        if len(span):
            chunks += [*vars(chunk).values()]
        begin += rows
    return chunks


@torch.library.custom_op("dsv4_cp::choose_entries", mutates_args=("q",))
def choose_entries_op(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    visible: torch.Tensor,
    topk: int,
    chunks: list[int],
) -> torch.Tensor:
    """Return int32 [B, L, min(topk, P)], ``NOTHING`` in unused slots, which come last.

    Args:
        q: Index queries before rotary [B, L, I, F], contiguous; rotated in place.
        weights: Float32 [B, L, I].
        keys: Index keys [B, P, F].
        cos: [B, L, r].
        sin: [B, L, r].
        visible: Int32 [B or 1, L, 2].
        topk: K.
        chunks: Of :func:`score_chunks`.
    """
    rotate_(q, cos, sin)
    shape = (*q.shape[:2], min(topk, keys.shape[1]))
    chosen = torch.full(shape, NOTHING, dtype=torch.int32, device=q.device)
    for chunk in _chunks_of(chunks):
        rows, n_scores = chunk.end - chunk.begin, chunk.scores
        scores = visible.new_empty(q.shape[0], rows, n_scores)
        maxima = visible.new_empty(q.shape[0], rows, n_scores // GROUP)
        where = {"first_query": chunk.begin, "first_entry": chunk.entry_begin}
        score_into(scores, maxima, q, weights, keys, visible, **where)
        choose_into(chosen, scores, maxima, visible, **where)
    return chosen


@choose_entries_op.register_fake
def _(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    visible: torch.Tensor,
    topk: int,
    chunks: list[int],
) -> torch.Tensor:
    return visible.new_empty(*q.shape[:2], min(topk, keys.shape[1]))


@tell("dsv4_cp::choose_entries")
def _(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    visible: torch.Tensor,
    topk: int,
    chunks: list[int],
) -> Cost:
    batch, length, heads, width = q.shape
    rotated = batch * length * heads * cos.shape[-1] * q.element_size()
    choice = 4 * batch * length * min(topk, keys.shape[1])
    launches, most = 2, 0
    read, written = rotated + 2 * batch * length * cos.shape[-1] * cos.element_size(), rotated
    for chunk in _chunks_of(chunks):
        rows, scored = batch * (chunk.end - chunk.begin), chunk.scores
        # Scores: q, weights and keys to scores and maxima; the best: maxima twice, and of the
        # groups that reach the bound, about K, the scores twice.
        launches, most = launches + 2, max(most, rows * _bytes_per_query(chunk))
        read += rows * heads * (width * q.element_size() + 4)
        read += batch * (chunk.entry_end - chunk.entry_begin) * width * keys.element_size()
        read += 2 * 4 * rows * (scored // GROUP + min(scored, topk * GROUP))
        written += rows * _bytes_per_query(chunk)
    return Cost(launches, read, written + 2 * choice, scratch_bytes=most)


@register_flop_formula(torch.ops.dsv4_cp.choose_entries)
def _(
    q: tuple[int, ...],
    weights: tuple[int, ...],
    keys: tuple[int, ...],
    cos: tuple[int, ...],
    sin: tuple[int, ...],
    visible: tuple[int, ...],
    topk: int,
    chunks: list[int],
    *_: Any,
    **__: Any,
) -> int:
    heads, width = q[2:]
    return 2 * heads * width * sum(chunk.seen for chunk in _chunks_of(chunks))


def choose_entries(
    q_BLIF: torch.Tensor,
    weights_BLI: torch.Tensor,
    keys_BPF: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    *,
    queries: Queries,
    ratio: int,
    topk: int,
    workspace_bytes: int,
) -> torch.Tensor:
    """Rotate index queries, in their memory, and choose entries; see :class:`Kernels`.

    Args:
        q_BLIF: Index queries before rotary.
        weights_BLI: Weight of each head, with the scale of the scores.
        keys_BPF: Index keys of all ranks' entries.
        rope: Cos and sin.
        queries: Which they are.
        ratio: Compress ratio of the entries.
        topk: How many entries a query may choose.
        workspace_bytes: How much the scores of a chunk of rows may take.

    Returns:
        Int32 [B, L, min(topk, P)] in order of place, ``NOTHING`` in unused slots.
    """
    batch = q_BLIF.shape[0]
    chunks = queries.once(
        ("score chunks", ratio, batch, workspace_bytes),
        lambda: score_chunks(queries, ratio, batch=batch, workspace_bytes=workspace_bytes),
    )
    bounds = queries.visible_entries(ratio, q_BLIF.device)
    cos, sin = (part.expand(q_BLIF.shape[0], -1, -1).contiguous() for part in rope)
    chosen: torch.Tensor = choose_entries_op(
        q_BLIF.contiguous(),
        weights_BLI.float().contiguous(),
        keys_BPF.contiguous(),
        cos,
        sin,
        torch.stack(bounds, dim=-1).to(torch.int32),
        topk,
        chunks,
    )
    return chosen
