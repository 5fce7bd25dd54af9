# SPDX-License-Identifier: Apache-2.0
"""The gradient of a tensor that many layers read: summed in float32 and rounded once.

Autograd would add the layers' gradients in the tensor's dtype and round after each. The entries of
a V4.1 source have up to 20 readers.

# B batch rows   P compressed entries   D entry width
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from nemo_dsv4_cp.automodel.torch_api import NO_BACKWARD, backward_id
from nemo_dsv4_cp.exchange.collectives import uncompiled


class GradientSum:
    """What the readers of one tensor add to in a backward, and its source takes.

    The readers return no gradient. Autograd nevertheless runs the source after the last of them.
    """

    def __init__(self, entries_BPD: torch.Tensor) -> None:
        self._shape, self._device = entries_BPD.shape, entries_BPD.device
        self._total: torch.Tensor | None = None
        self._backward = NO_BACKWARD

    def total(self) -> torch.Tensor:
        """Return the sum of the backward that runs, float32 [B, P, D]; the caller adds to it."""
        # One that raised, or that was for the gradient of the entries alone, left its own.
        if self._total is None or self._backward != backward_id():
            self._backward = backward_id()
            self._total = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        return self._total

    def take(self) -> torch.Tensor | None:
        """Return the sum and forget it; None if no reader added to it in this backward."""
        total, self._total = self._total, None
        return total if self._backward == backward_id() else None

    def read(self, entries_BPD: torch.Tensor) -> torch.Tensor:
        """Return the entries for one reader, whose gradient is added to the sum."""
        entries: torch.Tensor = _read(entries_BPD, self)
        return entries


def summing_gradients(entries_BPD: torch.Tensor) -> tuple[torch.Tensor, GradientSum | None]:
    """Return entries for readers, and the sum of their gradients.

    Args:
        entries_BPD: Those of all ranks.

    Returns:
        The entries, and None where autograd serves: without gradient, and in float32, where it adds
        without rounding to fewer bits.
    """
    if not (torch.is_grad_enabled() and entries_BPD.requires_grad):
        return entries_BPD, None
    if entries_BPD.element_size() >= 4:
        return entries_BPD, None
    gradients = GradientSum(entries_BPD)
    return _source(entries_BPD, gradients), gradients


# With readers i, and Q rounding to the dtype of x:
# forward:   y_i = x
# backward:  dx  = Q sum_i dy_i


class _Source(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries: torch.Tensor, gradients: GradientSum) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradients, ctx.dtype = gradients, entries.dtype
        return entries.view_as(entries)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        total = ctx.gradients.take()
        if total is None:
            return grad, None
        if grad is not None:  # of what took the entries without `read`
            total += grad
        return total.to(ctx.dtype), None


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entries: torch.Tensor, gradients: GradientSum) -> torch.Tensor:
        ctx.set_materialize_grads(False)  # kernels that add to the sum themselves return None
        ctx.gradients = gradients
        return entries.view_as(entries)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[None, None]:
        if grad is not None:
            total = ctx.gradients.total()
            total += grad
        return None, None


_source, _read = uncompiled(_Source.apply), uncompiled(_Read.apply)
