# SPDX-License-Identifier: Apache-2.0
"""All-gather of equal shards with autograd, in two steps: start it, and wait for it."""

# R CP ranks

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from nemo_dsv4_cp.exchange.collectives import (
    Group,
    InFlight,
    Pending,
    concatenated,
    cp_enabled,
    start_all_gather,
    start_reduce_scatter,
    summed,
    uncompiled,
)

# forward:   y   = concat_k x_k                    (all-gather)
# backward:  dx_r = sum_k (dy_k)[slice of rank r]  (reduce-scatter; all-to-all of 2-byte numbers)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: torch.Tensor, flight: InFlight, group: Group) -> torch.Tensor:
        ctx.flight = flight
        flight.begin(*start_all_gather(shard, group))
        return shard.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return summed(ctx.flight.end()), None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, started: torch.Tensor, flight: InFlight, dim: int, group: Group
    ) -> torch.Tensor:
        every = flight.end()
        ctx.flight, ctx.dim, ctx.ranks, ctx.group = flight, dim, len(every), group
        return concatenated(every, dim)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        every = grad.unflatten(ctx.dim, (ctx.ranks, -1)).movedim(ctx.dim, 0)
        ctx.flight.begin(*start_reduce_scatter(every, ctx.group))
        return grad.new_empty(0), None, None, None


_start, _wait = uncompiled(_Start.apply), uncompiled(_Wait.apply)


def start_gather(
    shard: torch.Tensor, *, dim: int, group: Group, overlap: bool
) -> Pending[torch.Tensor]:
    """Start to all-gather equal shards, to be concatenated on ``dim`` in rank order.

    Args:
        shard: This rank's [..., n, ...]; the same shape and dtype on every rank.
        dim: Dimension to concatenate on, not negative.
        group: CP group.
        overlap: Whether it may overlap with compute until the wait.

    Returns:
        [..., R * n, ...]. Its gradient is summed, in float32 or better, on the ranks that own the
        slices.
    """
    flight = InFlight(overlap)
    return Pending(partial(_wait, _start(shard, flight, group), flight, dim, group))


def all_gather(tensor: torch.Tensor, *, dim: int, cp_group: Group | None) -> torch.Tensor:
    """All-gather equal shards as :func:`start_gather` does, and wait; without CP the tensor."""
    if cp_group is None or not cp_enabled(cp_group):
        return tensor
    return start_gather(tensor, dim=dim % tensor.dim(), group=cp_group, overlap=False).wait()
