# SPDX-License-Identifier: Apache-2.0
"""Which rows of a per-token tensor move from rank to rank: index tensors and counts, per step.

In an exchange, every rank needs the rows of certain tokens, in a certain order. It holds some of
these rows itself, and other ranks send it the rest. This moves halos, the queries that a schedule
assigns to another rank, and the outputs of these queries.
"""

# B batch rows   L local tokens   R CP ranks   T rows of the answer   n rows that leave

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_dsv4_cp.sequence.queries import Runs, concatenated


@dataclass(frozen=True, eq=False)
class RowPlan:
    """One rank's part in an exchange of rows.

    Attributes:
        moves: Whether any row of any rank moves: the same on all ranks.
        leaving: Rows of the local tensor that leave, by destination: a slice, or int64 [n].
        leaving_counts: How many go to each rank.
        arriving_counts: How many come from each rank.
        missing: How many rows of the answer stand for tokens before the row's first: zeros.
        own: Rows of the local tensor in the answer: a slice, or int64.
        order: Int64 [T]: which of (missing, arriving, own) each row of the answer is; None where
            they are in order.
        wanted: Positions of the answer's tokens, negative before the row's first.
    """

    moves: bool
    leaving: slice | torch.Tensor
    leaving_counts: tuple[int, ...]
    arriving_counts: tuple[int, ...]
    missing: int
    own: slice | torch.Tensor
    order: torch.Tensor | None
    wanted: Runs

    @classmethod
    def of(
        cls,
        wanted: Sequence[Runs],
        own: Sequence[Runs],
        sent: Sequence[Runs] | None = None,
        *,
        rank: int,
        device: torch.device,
    ) -> RowPlan:
        """Return one rank's part.

        Args:
            wanted: Of each rank, the tokens of its answer, in order; negative before the first.
            own: Of each rank, the tokens that it has rows of, ascending.
            sent: Of each rank, the tokens that it sends rows of, ascending. By default ``own``, and
                never to itself. If given, they are rows of another tensor, and a rank may send to
                itself. Each token is sent by one rank, or is wanted by its owner only.
            rank: Whose part.
            device: Where indices live.
        """
        ranks = len(wanted)
        itself = rank if sent is None else None  # to which it sends nothing
        sent = own if sent is None else sent
        answer = _placed(wanted[rank])
        # Who has which tokens: nobody (-1), the ranks that send, and this rank itself (R).
        holders = [(min((start for start, _, _ in answer), default=0), 0, -1, 0)]
        holders += [
            (run.start, run.stop, sender, 0)
            for sender, runs in enumerate(sent)
            if sender != itself
            for run in runs
        ]
        holders += [(start, stop, ranks, shift) for start, stop, shift in _placed(own[rank])]
        pieces = [
            (holder, max(a, c) + place, min(b, d) - max(a, c), max(a, c) + shift)
            for a, b, place in answer
            for c, d, holder, shift in holders
            if a < d and c < b
        ]
        pieces.sort()
        counts = [0] * (ranks + 2)
        order, begin = [], 0
        for holder, place, length, _ in pieces:
            counts[holder + 1] += length
            order.append((place, range(begin, begin + length)))
            begin += length
        order.sort(key=lambda piece: piece[0])
        rows = _rows([run for _, run in order], device)

        mine = _placed(sent[rank])
        leaving = [
            (reader, range(max(run.start, c) + shift, min(run.stop, d) + shift))
            for reader, runs in enumerate(wanted)
            if reader != itself
            for run in runs
            for c, d, shift in mine
            if run.start < d and c < run.stop
        ]
        leaving_counts = [0] * ranks
        for reader, run in leaving:
            leaving_counts[reader] += len(run)
        return cls(
            moves=any(map(_lacks, wanted, own)),
            leaving=_rows([run for _, run in leaving], device),
            leaving_counts=tuple(leaving_counts),
            arriving_counts=tuple(counts[1:-1]),
            missing=counts[0],
            own=_rows([range(at, at + n) for who, _, n, at in pieces if who == ranks], device),
            order=None if isinstance(rows, slice) else rows,
            wanted=wanted[rank],
        )

    def divide(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of a tensor [B, L, ...] that stay and those that leave."""
        divided: tuple[torch.Tensor, torch.Tensor] = _Divided.apply(  # type: ignore[no-untyped-call]
            tensor, self.own, self.leaving
        )
        return divided

    def answer(self, own: torch.Tensor, arriving: torch.Tensor | None) -> torch.Tensor:
        """Put the answer together, [B, T, ...]; differentiable.

        Args:
            own: The rows of this rank's own, [B, rows, ...].
            arriving: Rows of other ranks, by rank; None where none move.
        """
        parts = [] if arriving is None else [arriving]
        if self.missing:
            parts.insert(0, own.new_zeros(own.shape[0], self.missing, *own.shape[2:]))
        whole = torch.cat((*parts, own), dim=1) if parts else own
        if self.order is None:
            return whole
        ordered: torch.Tensor = _Permuted.apply(whole, self.order)  # type: ignore[no-untyped-call]
        return ordered


def take(tensor: torch.Tensor, rows: slice | torch.Tensor) -> torch.Tensor:
    """Return rows of a per-token tensor [B, L, ...]: a view for a slice, else a copy."""
    if isinstance(rows, slice):
        whole = rows == slice(0, tensor.shape[1])  # itself: a slice's backward copies
        return tensor if whole else tensor[:, rows]
    taken: torch.Tensor = _Rows.apply(tensor, rows)  # type: ignore[no-untyped-call]
    return taken


# Indices are attributes, not saved tensors: under activation checkpointing a rank that unpacks one
# recomputes the layer at once, and would start its collectives in another order than the others.


class _Rows(torch.autograd.Function):
    # forward:   y = x[:, rows]
    # backward:  dx[:, rows] += dy

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.rows, ctx.length = rows, tensor.shape[1]
        return tensor.index_select(1, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.new_zeros(grad.shape[0], ctx.length, *grad.shape[2:])
        return total.index_add_(1, ctx.rows, grad), None


class _Divided(torch.autograd.Function):
    # forward:   y = x[:, own], z = x[:, leaving]
    # backward:  dx[:, own] = dy, then dx[:, leaving] += dz

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        own: slice | torch.Tensor,
        leaving: slice | torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.own, ctx.leaving, ctx.length = own, leaving, tensor.shape[1]
        parts = [
            tensor[:, rows] if isinstance(rows, slice) else tensor.index_select(1, rows)
            for rows in (own, leaving)
        ]
        return parts[0], parts[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_own: torch.Tensor, grad_leaving: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        if ctx.own == slice(0, ctx.length):
            total = grad_own.clone()
        else:
            total = grad_own.new_zeros(grad_own.shape[0], ctx.length, *grad_own.shape[2:])
            _add(total, ctx.own, grad_own)
        _add(total, ctx.leaving, grad_leaving)
        return total, None, None


def _add(total: torch.Tensor, rows: slice | torch.Tensor, part: torch.Tensor) -> None:
    if isinstance(rows, slice):
        total[:, rows] += part
    else:
        total.index_add_(1, rows, part)


class _Permuted(torch.autograd.Function):
    # forward:   y = x[:, order], each row of x once
    # backward:  dx[:, order] = dy

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.order = order
        return tensor.index_select(1, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.empty_like(grad).index_copy_(1, ctx.order, grad), None


def rows_of(runs: Runs, start: int, device: torch.device) -> slice | torch.Tensor:
    """Return which rows of a shard that starts at ``start`` runs of positions are."""
    return _rows([range(run.start - start, run.stop - start) for run in runs], device)


def _rows(runs: Iterable[range], device: torch.device) -> slice | torch.Tensor:
    """Return the numbers of ranges one after another: a slice where they follow one another."""
    merged: list[range] = []
    for run in runs:
        if merged and merged[-1].stop == run.start:
            merged[-1] = range(merged[-1].start, run.stop)
        else:
            merged.append(run)
    if len(merged) > 1:
        return concatenated(tuple(merged), device)
    return slice(merged[0].start, merged[0].stop) if merged else slice(0, 0)


def _placed(runs: Runs) -> list[tuple[int, int, int]]:
    """Return of each run its start, its stop, and what to add to its tokens to get their rows."""
    placed, row = [], 0
    for run in runs:
        placed.append((run.start, run.stop, row - run.start))
        row += len(run)
    return placed


def _lacks(wanted: Runs, own: Runs) -> bool:
    """Return whether a rank wants tokens that exist and that it does not have."""
    exist = sum(max(run.stop, 0) - max(run.start, 0) for run in wanted)
    return exist != sum(
        max(min(a.stop, b.stop) - max(a.start, b.start), 0) for a in wanted for b in own
    )
