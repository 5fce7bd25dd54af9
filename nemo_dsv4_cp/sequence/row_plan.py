# SPDX-License-Identifier: Apache-2.0
"""How one rank's rows of a per-token tensor move: index tensors and counts, made once per step."""

# B batch rows   L local tokens   R CP ranks   T rows of the answer   n rows that leave

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from nemo_dsv4_cp.sequence.queries import Runs, concatenated
from nemo_dsv4_cp.sequence.transfers import Transfers


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
    def of(cls, transfers: Transfers, ranks: int, device: torch.device) -> RowPlan:
        """Lay an exchange out as indices.

        Args:
            transfers: This rank's part, piece by piece.
            ranks: R.
            device: Where indices live.
        """
        received = [transfers.arriving.get(rank, 0) for rank in range(ranks)]
        missing = sum(len(piece) for piece in transfers.pieces if not piece.exists)
        arrivals = sum(received)
        # Where the next row of each kind stands among (missing, arriving by rank, own).
        begins = [missing + sum(received[:rank]) for rank in range(ranks)]
        next_missing, next_own = 0, missing + arrivals
        order: list[range] = []
        own: list[range] = []
        for piece in transfers.pieces:
            if piece.is_own:
                own.append(range(piece.rows.start, piece.rows.stop))
                begin, next_own = next_own, next_own + len(piece)
            elif piece.source is None:
                begin, next_missing = next_missing, next_missing + len(piece)
            else:
                begin = begins[piece.source]
                begins[piece.source] += len(piece)
            order.append(range(begin, begin + len(piece)))
        sent = [
            range(part.start, part.stop)
            for rank in range(ranks)
            for part in transfers.sent.get(rank, ())
        ]
        return cls(
            moves=transfers.any_moves,
            leaving=_rows(sent, device),
            leaving_counts=tuple(transfers.leaving.get(rank, 0) for rank in range(ranks)),
            arriving_counts=tuple(received),
            missing=missing,
            own=_rows(own, device),
            order=None if _joined(order) else concatenated(tuple(order), device),
            wanted=transfers.wanted,
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


def _rows(runs: list[range], device: torch.device) -> slice | torch.Tensor:
    if _joined(runs):
        return slice(runs[0].start, runs[-1].stop) if runs else slice(0, 0)
    return concatenated(tuple(runs), device)


def _joined(runs: list[range]) -> bool:
    """Return whether each run begins where the one before ends."""
    return all(a.stop == b.start for a, b in pairwise(runs))
