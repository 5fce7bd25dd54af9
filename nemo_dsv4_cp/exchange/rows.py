# SPDX-License-Identifier: Apache-2.0
"""Rows of per-token tensors from rank to rank with autograd, in two steps: start, and wait.

One all-to-all of bytes carries the rows of all tensors, whatever their dtypes. It runs on the
group's own stream of collectives, so it can neither overtake nor deadlock with the others.
"""

# B batch rows   R CP ranks   n rows that leave   m rows that arrive

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import compress
from operator import attrgetter, not_
from typing import Any

import torch

from nemo_dsv4_cp.exchange.collectives import Group, InFlight, start_all_to_all, uncompiled
from nemo_dsv4_cp.sequence.row_plan import RowPlan

_ALIGNED = 16
"""Bytes that each tensor's rows begin at a multiple of, so that any dtype can view them."""

# forward:   arriving_i = the rows of tensor i that each rank sends to this one
# backward:  d leaving_i = the gradients of the rows that this rank sent to each


def start_rows(
    leaving: Sequence[torch.Tensor], plans: Sequence[RowPlan], *, group: Group, overlap: bool
) -> Callable[[], Sequence[torch.Tensor]]:
    """Start to send rows of several tensors.

    Gradients return to the rows' owners, who wait for them: whatever takes a gradient must be used
    on every rank.

    Args:
        leaving: [B, n, ...] each, by destination.
        plans: This rank's part in the exchange of each; the ranks' parts must fit together.
        group: CP group.
        overlap: Whether the exchange may overlap with compute until the wait.

    Returns:
        A function that waits for the rows that arrive: [B, m, ...] of each tensor, by source.
    """
    flight, needs_grad = InFlight(overlap), list(map(attrgetter("requires_grad"), leaving))
    started = _start(plans, needs_grad, flight, group, *leaving)
    return partial(_wait, started, plans, needs_grad, flight, group)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plans: Sequence[RowPlan],
        needs_grad: Sequence[bool],
        flight: InFlight,
        group: Group,
        *leaving: torch.Tensor,
    ) -> torch.Tensor:
        ctx.needs_grad, ctx.flight = needs_grad, flight
        _begin(leaving, map(attrgetter("leaving_counts", "arriving_counts"), plans), flight, group)
        return leaving[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = iter(_end(ctx.flight))
        return None, None, None, None, *(next(grads) if does else None for does in ctx.needs_grad)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        started: torch.Tensor,
        plans: Sequence[RowPlan],
        needs_grad: Sequence[bool],
        flight: InFlight,
        group: Group,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)  # of rows that take none
        ctx.plans, ctx.needs_grad, ctx.flight, ctx.group = plans, needs_grad, flight, group
        arriving = _end(flight)
        ctx.device = started.device
        ctx.like = list(map(attrgetter("shape", "dtype"), arriving))
        ctx.mark_non_differentiable(*compress(arriving, map(not_, needs_grad)))
        return tuple(arriving)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        sent = []
        for grad, (shape, dtype) in compress(zip(grads, ctx.like, strict=True), ctx.needs_grad):
            zeros = partial(torch.zeros, shape, dtype=dtype, device=ctx.device)
            sent.append(zeros() if grad is None else grad)
        if sent:
            plans = compress(ctx.plans, ctx.needs_grad)
            counts = map(attrgetter("arriving_counts", "leaving_counts"), plans)
            _begin(sent, counts, ctx.flight, ctx.group)
        return torch.empty(0, device=ctx.device), None, None, None, None


_start, _wait = uncompiled(_Start.apply), uncompiled(_Wait.apply)


def _begin(
    tensors: Sequence[torch.Tensor],
    counts: Iterable[tuple[Sequence[int], Sequence[int]]],
    flight: InFlight,
    group: Group,
) -> None:
    """Start to send each tensor's rows, [B, rows, ...] by destination.

    Args:
        tensors: Not empty.
        counts: Of each tensor, how many rows leave for each rank and how many arrive from it.
        flight: What the exchange becomes.
        group: CP group.
    """
    leaving, arriving = zip(*counts, strict=True)
    outgoing, leaving_sizes, blocks = _buffer(tensors, leaving)
    _copy(blocks, tensors, leaving, into_blocks=True)
    incoming, arriving_sizes, blocks = _buffer(tensors, arriving)
    work = start_all_to_all(incoming, outgoing, arriving_sizes, leaving_sizes, group)
    like = list(map(attrgetter("shape", "dtype"), tensors))
    flight.begin(work, (incoming, blocks, arriving, like))


def _end(flight: InFlight) -> list[torch.Tensor]:
    """Wait, and return of each tensor the rows that arrived, [B, rows, ...] by source."""
    memory, blocks, counts, like = flight.end()
    tensors = []
    for ((batch, _, *row), dtype), of_ranks in zip(like, counts, strict=True):
        tensors.append(memory.new_empty((batch, sum(of_ranks), *row), dtype=dtype))
    _copy(blocks, tensors, counts, into_blocks=False)
    return tensors


def _buffer(
    like: Sequence[torch.Tensor], counts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, list[int], list[torch.Tensor]]:
    """Allocate ``counts[i][rank]`` rows of tensor i for each rank, rank by rank.

    Returns:
        The memory, how many bytes of it are each rank's, and views of it [B, rows, ...]: tensor by
        tensor a block for each rank that has rows.
    """
    places: list[tuple[int, int, int]] = []
    sizes, end = [], 0
    for rank in range(len(counts[0])):
        begin = end
        for i, of_ranks in enumerate(counts):
            if of_ranks[rank]:
                places.append((i, end, of_ranks[rank]))
                size = of_ranks[rank] * _row_bytes(like[i])
                end += -(-size // _ALIGNED) * _ALIGNED
        sizes.append(end - begin)
    memory = torch.empty(end, dtype=torch.uint8, device=like[0].device)
    blocks = []
    for i, at, rows in sorted(places):
        block = memory[at : at + rows * _row_bytes(like[i])].view(like[i].dtype)
        blocks.append(block.view(like[i].shape[0], rows, *like[i].shape[2:]))
    return memory, sizes, blocks


def _row_bytes(tensor: torch.Tensor) -> int:
    """Return how many bytes one row of all B is."""
    return tensor.shape[0] * math.prod(tensor.shape[2:]) * tensor.element_size()


def _copy(
    blocks: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    counts: Sequence[Sequence[int]],
    *,
    into_blocks: bool,
) -> None:
    """Copy between blocks and the rows of tensors: one launch for each dtype."""
    of_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    remaining = iter(blocks)
    for tensor, of_ranks in zip(tensors, counts, strict=True):
        targets, sources = of_dtype.setdefault(tensor.dtype, ([], []))
        begin = 0
        for rows in filter(None, of_ranks):
            part, block = tensor[:, begin : begin + rows], next(remaining)
            targets.append(block if into_blocks else part)
            sources.append(part if into_blocks else block)
            begin += rows
    for targets, sources in of_dtype.values():
        if targets:
            torch._foreach_copy_(targets, sources)
