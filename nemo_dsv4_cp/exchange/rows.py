# SPDX-License-Identifier: Apache-2.0
"""Rows of per-token tensors from rank to rank with autograd, in two steps: start, and wait.

One all-to-all of bytes carries the rows of all tensors, whatever their dtypes. It runs on the
group's own stream of collectives, so it can neither overtake nor deadlock with the others.
"""

# B batch rows   R CP ranks   n rows that leave   m rows that arrive

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from nemo_dsv4_cp.exchange.collectives import Group, cp_enabled, start_all_to_all
from nemo_dsv4_cp.exchange.in_flight import InFlight, uncompiled
from nemo_dsv4_cp.sequence.row_plan import RowPlan, take

_ALIGNED = 16
"""Bytes that each tensor's rows begin at a multiple of, so that any dtype can view them."""

# forward:   arriving_i = the rows of tensor i that each rank sends to this one
# backward:  d leaving_i = the gradients of the rows that this rank sent to each


class _Buffer:
    """Bytes to, or from, every rank: of each rank the rows of all tensors, one after another."""

    def __init__(
        self, like: Sequence[torch.Tensor], counts: Sequence[Sequence[int]], group: Group
    ) -> None:
        """Allocate ``counts[i][rank]`` rows of tensor i, [B, rows, ...] each."""
        self._group, self._counts = group, counts
        self._like = [(tensor.shape[0], tensor.shape[2:], tensor.dtype) for tensor in like]
        row_bytes = [b * row.numel() * dtype.itemsize for b, row, dtype in self._like]
        self._bytes = [
            [-(-rows * size // _ALIGNED) * _ALIGNED for rows in of_ranks]
            for of_ranks, size in zip(counts, row_bytes, strict=True)
        ]
        self.sizes = [sum(of_rank) for of_rank in zip(*self._bytes, strict=True)]
        self.memory = torch.empty(sum(self.sizes), dtype=torch.uint8, device=like[0].device)

    def write(self, tensors: Sequence[torch.Tensor]) -> None:
        """Fill it with each tensor's rows, which are in the order of the ranks."""
        self._copy(tensors, into_memory=True)

    def read(self) -> list[torch.Tensor]:
        """Return each tensor's rows, [B, rows, ...], in the order of the ranks."""
        tensors = [
            self.memory.new_empty((batch, sum(counts), *row), dtype=dtype)
            for (batch, row, dtype), counts in zip(self._like, self._counts, strict=True)
        ]
        self._copy(tensors, into_memory=False)
        return tensors

    def _copy(self, tensors: Sequence[torch.Tensor], *, into_memory: bool) -> None:
        """Copy between tensors and memory: one launch for each dtype."""
        pairs: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        begins = [0] * len(tensors)
        at = 0
        for rank in range(len(self.sizes)):
            for i, (batch, row, dtype) in enumerate(self._like):
                rows = self._counts[i][rank]
                if rows:
                    size = batch * rows * row.numel() * dtype.itemsize
                    block = self.memory[at : at + size].view(dtype).view(batch, rows, *row)
                    blocks, parts = pairs.setdefault(dtype, ([], []))
                    blocks.append(block)
                    parts.append(tensors[i][:, begins[i] : begins[i] + rows])
                    begins[i] += rows
                at += self._bytes[i][rank]
        for blocks, parts in pairs.values():
            torch._foreach_copy_(*((blocks, parts) if into_memory else (parts, blocks)))

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
        plans: Sequence[RowPlan],
        learns: Sequence[bool],
        flight: InFlight,
        group: Group,
        *leaving: torch.Tensor,
    ) -> torch.Tensor:
        ctx.learns, ctx.flight = learns, flight
        outgoing = _Buffer(leaving, [plan.leaving_counts for plan in plans], group)
        outgoing.write(leaving)
        incoming = _Buffer(leaving, [plan.arriving_counts for plan in plans], group)
        outgoing.send(incoming, flight)
        return leaving[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = iter(ctx.flight.end().read())
        return None, None, None, None, *(next(grads) if does else None for does in ctx.learns)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        started: torch.Tensor,
        plans: Sequence[RowPlan],
        learns: Sequence[bool],
        flight: InFlight,
        group: Group,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)  # of rows that take none
        ctx.plans, ctx.learns, ctx.flight, ctx.group = plans, learns, flight, group
        arriving = flight.end().read()
        ctx.shapes = [(rows.shape, rows.dtype) for rows in arriving]
        ctx.device = started.device
        ctx.mark_non_differentiable(
            *(rows for rows, does in zip(arriving, learns, strict=True) if not does)
        )
        return tuple(arriving)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        sent, plans = [], []
        for grad, plan, does, (shape, dtype) in zip(
            grads, ctx.plans, ctx.learns, ctx.shapes, strict=True
        ):
            if does:
                if grad is None:
                    grad = torch.zeros(shape, dtype=dtype, device=ctx.device)
                sent.append(grad)
                plans.append(plan)
        if sent:
            outgoing = _Buffer(sent, [plan.arriving_counts for plan in plans], ctx.group)
            outgoing.write(sent)
            incoming = _Buffer(sent, [plan.leaving_counts for plan in plans], ctx.group)
            outgoing.send(incoming, ctx.flight)
        return torch.empty(0, device=ctx.device), None, None, None, None


_start, _wait = uncompiled(_Start.apply), uncompiled(_Wait.apply)


class RowsInFlight:
    """Rows of other ranks on their way, of several tensors by name."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        plans: Mapping[str, RowPlan],
        *,
        cp_group: Group | None,
        overlap: bool,
        returned: bool = False,
    ) -> None:
        """Start to exchange the rows that move.

        Args:
            tensors: [B, L, ...] each, what other ranks may want rows of.
            plans: This rank's part in the exchange of each; the ranks' parts must fit together.
            cp_group: CP group; without CP nothing moves.
            overlap: Whether it goes on behind what is computed until the wait; else it is waited
                for.
            returned: Whether the rows of this rank's own are of other tensors, that :meth:`wait`
                is given.
        """
        self._plans = {name: plans[name] for name in tensors}
        enabled = cp_group is not None and cp_enabled(cp_group)
        self._moving = moving = [n for n, plan in self._plans.items() if enabled and plan.moves]
        self._own: dict[str, torch.Tensor] = {}
        leaving: list[torch.Tensor] = []
        for name, tensor in tensors.items():
            plan = self._plans[name]
            if name in moving and returned:
                leaving.append(take(tensor, plan.leaving))
            elif name in moving:
                self._own[name], leaves = plan.divide(tensor)
                leaving.append(leaves)
            elif not returned:
                self._own[name] = take(tensor, plan.own)
        self._arriving: Callable[[], Sequence[torch.Tensor]] = tuple
        if not moving:
            return
        assert cp_group is not None
        flight, parts = InFlight(overlap=overlap), [self._plans[name] for name in moving]
        learns = [rows.requires_grad for rows in leaving]
        started = _start(parts, learns, flight, cp_group, *leaving)
        self._arriving = lambda: _wait(started, parts, learns, flight, cp_group)

    def wait(self, own: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Return of each tensor its answer, [B, T, ...], zeros where a token does not exist.

        Gradients return to the rows' owners, who wait for them: whatever takes a gradient must be
        used on every rank.

        Args:
            own: Of returned rows, those that this rank computed itself, by name.
        """
        arriving = dict(zip(self._moving, self._arriving(), strict=True))
        answers = {}
        for name, plan in self._plans.items():
            mine = self._own[name] if own is None else take(own[name], plan.own)
            answers[name] = plan.answer(mine, arriving.get(name))
        return answers
