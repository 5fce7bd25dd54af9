# SPDX-License-Identifier: Apache-2.0
"""All-gather of equal shards with autograd, in two steps: start it, and wait for it."""

# R CP ranks

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

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


class Codec(Protocol):
    """Stores values that training quantizes in fewer bytes, without further loss."""

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Return the codes [..., bytes] of values [..., D]."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the quantized values [..., D], in the dtype of the values, of codes."""


# With Q of a codec, whose gradient is straight-through, or without one Q x = x:
# forward:   y   = Q concat_k x_k                  (all-gather, of Q's codes)
# backward:  dx_r = sum_k (dy_k)[slice of rank r]  (reduce-scatter; all-to-all of 2-byte numbers)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, shard: torch.Tensor, flight: InFlight, group: Group, codec: Codec | None
    ) -> torch.Tensor:
        ctx.flight = flight
        flight.begin(*start_all_gather(codec.encode(shard) if codec else shard, group))
        return shard.new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return summed(ctx.flight.end()), None, None, None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        started: torch.Tensor,
        flight: InFlight,
        dim: int,
        group: Group,
        codec: Codec | None,
    ) -> torch.Tensor:
        every = flight.end()
        ctx.flight, ctx.dim, ctx.ranks, ctx.group = flight, dim, len(every), group
        whole = concatenated(every, dim)
        return codec.decode(whole) if codec else whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        every = grad.unflatten(ctx.dim, (ctx.ranks, -1)).movedim(ctx.dim, 0)
        ctx.flight.begin(*start_reduce_scatter(every, ctx.group))
        return grad.new_empty(0), None, None, None, None


class _Quantize(torch.autograd.Function):
    # forward:   y  = Q x
    # backward:  dx = dy

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, codec: Codec) -> torch.Tensor:
        return codec.decode(codec.encode(values))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


_start, _wait = uncompiled(_Start.apply), uncompiled(_Wait.apply)
# Compiled, Q could round otherwise than it does under CP.
_quantize = uncompiled(_Quantize.apply)


def start_gather(
    shard: torch.Tensor, *, dim: int, group: Group, overlap: bool, codec: Codec | None = None
) -> Pending[torch.Tensor]:
    """Start to all-gather equal shards, to be concatenated on ``dim`` in rank order.

    Args:
        shard: This rank's [..., n, ...]; the same shape and dtype on every rank.
        dim: Dimension to concatenate on, not negative.
        group: CP group.
        overlap: Whether it may overlap with compute until the wait.
        codec: Quantizes the values; its codes move instead. Then ``dim`` is not the last.

    Returns:
        [..., R * n, ...], quantized by a codec. Its gradient is summed, in float32 or better, on
        the ranks that own the slices; it has the dtype of the values and passes the codec as it is.
    """
    flight = InFlight(overlap)
    started = _start(shard, flight, group, codec)
    return Pending(partial(_wait, started, flight, dim, group, codec))


def quantized(values: torch.Tensor, codec: Codec) -> torch.Tensor:
    """Return what a gather with ``codec`` would of one rank: the gradient is straight-through."""
    rounded: torch.Tensor = _quantize(values, codec)
    return rounded


def all_gather(tensor: torch.Tensor, *, dim: int, cp_group: Group | None) -> torch.Tensor:
    """All-gather equal shards as :func:`start_gather` does, and wait; without CP the tensor."""
    if cp_group is None or not cp_enabled(cp_group):
        return tensor
    return start_gather(tensor, dim=dim % tensor.dim(), group=cp_group, overlap=False).wait()
