"""Exchange of rows of per-token tensors with autograd, in two steps: start it, and wait for it.

One all-to-all of bytes carries the rows of all tensors, whatever their dtypes. It runs on the
group's own stream of collectives, so it can neither overtake nor deadlock with the others.
"""

# B batch rows   L local tokens   T tokens of an answer   R CP ranks

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from nemo_dsv4_cp.exchange.collectives import Group, cp_enabled, cp_size, start_all_to_all
from nemo_dsv4_cp.exchange.in_flight import InFlight, uncompiled
from nemo_dsv4_cp.sequence.transfers import Piece, Transfers

_ALIGNED = 16
"""Bytes that each tensor's rows begin at a multiple of, so that any dtype can view them."""

# forward:   an answer's rows come from this rank's own tensor, or from a rank that sends them
# backward:  each owner adds up the gradients of the rows that it sent


class _Buffer:
    """Rows of several tensors for, or from, every rank: bytes in one piece of memory."""

    def __init__(
        self, like: Sequence[torch.Tensor], rows: Sequence[Mapping[int, int]], group: Group
    ) -> None:
        """Make room for ``rows[i][rank]`` rows of the tensors i, [B, rows, ...] each."""
        self._group, self._rows = group, rows
        self._like = [(each.shape[0], each.shape[2:], each.dtype) for each in like]
        self.sizes = [
            sum(self._bytes(i, counts.get(rank, 0)) for i, counts in enumerate(rows))
            for rank in range(cp_size(group))
        ]
        device = like[0].device
        self.memory = torch.empty(sum(self.sizes), dtype=torch.uint8, device=device)

    def _bytes(self, tensor: int, rows: int) -> int:
        batch, row, dtype = self._like[tensor]
        return -(-batch * rows * row.numel() * dtype.itemsize // _ALIGNED) * _ALIGNED

    def blocks(self) -> list[dict[int, torch.Tensor]]:
        """Return, of each tensor, the [B, rows, ...] of each rank that has any, as views."""
        views: list[dict[int, torch.Tensor]] = [{} for _ in self._rows]
        begin = 0
        for rank in range(len(self.sizes)):
            for i, (batch, row, dtype) in enumerate(self._like):
                if count := self._rows[i].get(rank, 0):
                    taken = batch * count * row.numel() * dtype.itemsize
                    flat = self.memory[begin : begin + taken].view(dtype)
                    views[i][rank] = flat.view(batch, count, *row)
                    begin += self._bytes(i, count)
        return views

    def send(self, arriving: _Buffer, flight: InFlight) -> None:
        """Start to send every rank its rows; theirs land in ``arriving``."""
        work = start_all_to_all(
            arriving.memory, self.memory, arriving.sizes, self.sizes, self._group
        )
        flight.begin(work, arriving)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        transfers: Sequence[Transfers],
        moved: Sequence[int],
        flight: InFlight,
        group: Group,
        *sent: torch.Tensor,
    ) -> torch.Tensor:
        ctx.transfers, ctx.moved, ctx.flight = transfers, moved, flight
        ctx.lengths = [tensor.shape[1] for tensor in sent]
        ctx.no_rows = [t.new_empty(t.shape[0], 0, *t.shape[2:]) for t in sent]
        leaving = _Buffer(sent, [each.leaving for each in transfers], group)
        for tensor, transfer, blocks in zip(sent, transfers, leaving.blocks(), strict=True):
            for rank, block in blocks.items():
                for rows, part in _split(block, transfer.sent[rank]):
                    part.copy_(tensor[:, rows])
        leaving.send(_Buffer(sent, [each.arriving for each in transfers], group), flight)
        return sent[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads: list[torch.Tensor | None] = [None] * len(ctx.lengths)
        for i, blocks in zip(ctx.moved, ctx.flight.end().blocks(), strict=True):
            sent = ctx.transfers[i].sent
            parts = [part for rank in blocks for part in _split(blocks[rank], sent[rank])]
            grads[i] = _sum_of_rows(parts, ctx.lengths[i], ctx.no_rows[i])
        return None, None, None, None, *grads


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        started: torch.Tensor,
        transfers: Sequence[Transfers],
        moved: Sequence[int],
        flight: InFlight,
        group: Group,
        *own: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)  # of what takes none
        ctx.transfers, ctx.moved, ctx.flight, ctx.group = transfers, moved, flight, group
        ctx.device, ctx.lengths = started.device, [tensor.shape[1] for tensor in own]
        answers = [
            torch.cat(_parts_of(transfer, tensor, blocks), dim=1)
            for transfer, tensor, blocks in zip(transfers, own, flight.end().blocks(), strict=True)
        ]
        ctx.mark_non_differentiable(
            *(
                answer
                for i, answer in enumerate(answers)
                if i not in moved and not ctx.needs_input_grad[5 + i]
            )
        )
        return tuple(answers)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        moved, transfers = ctx.moved, [ctx.transfers[i] for i in ctx.moved]
        if moved:
            of_moved = [grads[i] for i in moved]
            leaving = _Buffer(of_moved, [each.arriving for each in transfers], ctx.group)
            for grad, transfer, blocks in zip(of_moved, transfers, leaving.blocks(), strict=True):
                begin = dict.fromkeys(blocks, 0)
                for rows, piece in _pieces(transfer):
                    if piece.source is not None:
                        at = begin[piece.source]
                        begin[piece.source] = at + len(piece)
                        blocks[piece.source][:, at : at + len(piece)] = grad[:, rows]
            arriving = _Buffer(of_moved, [each.leaving for each in transfers], ctx.group)
            leaving.send(arriving, ctx.flight)
        own: list[torch.Tensor | None] = [
            _of_own(transfer, grad, length) if needed and grad is not None else None
            for transfer, grad, length, needed in zip(
                ctx.transfers, grads, ctx.lengths, ctx.needs_input_grad[5:], strict=True
            )
        ]
        started = torch.empty(0, device=ctx.device)
        return started, None, None, None, None, *own


def _split(block: torch.Tensor, parts: Sequence[slice]) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield each of ``parts`` with its rows of a block that holds them end to end."""
    begin = 0
    for rows in parts:
        end = begin + rows.stop - rows.start
        yield rows, block[:, begin:end]
        begin = end


def _pieces(transfer: Transfers) -> Iterator[tuple[slice, Piece]]:
    """Yield each piece with its rows of the answer."""
    begin = 0
    for piece in transfer.pieces:
        yield slice(begin, begin + len(piece)), piece
        begin += len(piece)


def _parts_of(
    transfer: Transfers, own: torch.Tensor, blocks: Mapping[int, torch.Tensor]
) -> list[torch.Tensor]:
    """Return the pieces of an answer, [B, rows, ...] each, views where they exist."""
    parts, begin = [], dict.fromkeys(blocks, 0)
    for piece in transfer.pieces:
        if piece.is_own:
            parts.append(own[:, piece.rows])
        elif piece.source is None:
            parts.append(own.new_zeros(own.shape[0], len(piece), *own.shape[2:]))
        else:
            at = begin[piece.source]
            begin[piece.source] = at + len(piece)
            parts.append(blocks[piece.source][:, at : at + len(piece)])
    return parts or [own[:, :0]]


def unmoved(transfer: Transfers, own: torch.Tensor) -> torch.Tensor:
    """Return an answer to which no other rank adds, as it is if it is one piece."""
    parts = _parts_of(transfer, own, {})
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _of_own(transfer: Transfers, grad: torch.Tensor, length: int) -> torch.Tensor | None:
    """Return what an answer's gradient gives to the rows that were this rank's own."""
    parts = [(piece.rows, grad[:, rows]) for rows, piece in _pieces(transfer) if piece.is_own]
    return _sum_of_rows(parts, length, grad[:, :0])


def _sum_of_rows(
    parts: Sequence[tuple[slice, torch.Tensor]], length: int, no_rows: torch.Tensor
) -> torch.Tensor | None:
    """Return the sum of gradients of some rows each, [B, length, ...].

    None where rows got nothing; for a tensor without rows, a gradient without rows: what lies
    behind it may be others' to wait for.
    """
    if not parts:
        return no_rows if length == 0 else None
    ordered = sorted((rows.start, rows.stop) for rows, _ in parts)
    apart = all(stop <= start for (_, stop), (start, _) in pairwise(ordered))
    whole = apart and sum(stop - start for start, stop in ordered) == length
    if whole and len(parts) == 1:
        return parts[0][1]
    shape = (no_rows.shape[0], length, *no_rows.shape[2:])
    total = no_rows.new_empty(shape) if whole else no_rows.new_zeros(shape)
    for rows, part in parts:
        if apart:
            total[:, rows] = part
        else:
            total[:, rows] += part
    return total


Wait = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
"""Returns the answers, given the tensors that their rows of this rank's own are of."""


_start, _wait = uncompiled(_Start.apply), uncompiled(_Wait.apply)


def start_exchange(
    sent: Sequence[torch.Tensor],
    transfers: Sequence[Transfers],
    *,
    cp_group: Group | None,
    overlap: bool,
) -> Wait:
    """Start to fetch rows of other ranks' per-token tensors, in one exchange for all of them.

    Args:
        sent: [B, L, ...] each, what other ranks may want rows of.
        transfers: This rank's part in the exchange of each; the ranks' parts must fit together.
        cp_group: CP group; without CP nothing moves.
        overlap: Whether it goes on behind what is computed until the wait; else it is waited for.

    Returns:
        What waits for the answers: of each [B, T, ...], zero where a token does not exist.
        Gradients return to the rows' owners, who wait for them: whatever takes a gradient must be
        used on every rank.
    """
    moving = [i for i, each in enumerate(transfers) if each.any_moves]
    if cp_group is None or not cp_enabled(cp_group) or not moving:
        return lambda own: [unmoved(t, o) for t, o in zip(transfers, own, strict=True)]
    flight, parts = InFlight(overlap=overlap), [transfers[i] for i in moving]
    recorded = torch.is_grad_enabled()
    moved = [n for n, i in enumerate(moving) if recorded and sent[i].requires_grad]
    started = _start(parts, moved, flight, cp_group, *(sent[i] for i in moving))

    def wait(own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        mine = [own[i] for i in moving]
        arrived = _wait(started, parts, moved, flight, cp_group, *mine)
        answers = dict(zip(moving, arrived, strict=True))
        return [
            answers[i] if i in answers else unmoved(transfer, own[i])
            for i, transfer in enumerate(transfers)
        ]

    return wait
