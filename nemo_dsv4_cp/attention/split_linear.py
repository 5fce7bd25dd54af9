# SPDX-License-Identifier: Apache-2.0
"""``compressor_precision: bf16x3``: float32 projections of bfloat16 activations on tensor cores.

A float32 number is the sum of three of bfloat16, of 8 bits each, and a product of two of bfloat16
is exact in float32. So of x in bfloat16 and w in float32,

    y  = x w^T    = x w0^T + x w1^T + x w2^T            float32's accuracy
    dw = dy^T x   = dy0^T x + dy1^T x + dy2^T x         the same
    dx = dy w     ~ dy0 w0 + dy0 w1 + dy1 w0            2^-16; dx is rounded to bfloat16 in the end

with sums in float32: three products of bfloat16, for one of float32 that has no tensor cores.
"""

# T tokens   E input width   F output width

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

BF16X3 = "bf16x3"

Factors = tuple[torch.Tensor, torch.Tensor]


class SplitLinear(nn.Linear):
    """A float32 ``nn.Linear`` without bias that can project bfloat16 activations on tensor cores.

    FSDP2 and LoRA change a module's class to a subclass of its own: parameters and hooks are those
    of ``nn.Linear``, and so is the forward under LoRA.
    """

    @classmethod
    def adopt(cls, linear: nn.Linear) -> None:
        """Turn a linear into this class in place."""
        assert type(linear) is nn.Linear and linear.bias is None
        linear.__class__ = cls

    def forward(self, input: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Project [..., E] to float32 [..., F].

        Args:
            input: Float32: FSDP2 would cast activations of other dtypes to that.
            exact: Every number of it is one of bfloat16.
        """
        if not exact:
            return super().forward(input)
        rows: torch.Tensor = _Project.apply(input.flatten(0, -2), self.weight)  # type: ignore[no-untyped-call]
        return rows.view(*input.shape[:-1], rows.shape[-1])


class _Project(torch.autograd.Function):
    """See the module: y [T, F] of x [T, E] and w [F, E]."""

    @staticmethod
    def forward(ctx: Any, x_TE: torch.Tensor, weight_FE: torch.Tensor) -> torch.Tensor:
        x = x_TE.to(torch.bfloat16)
        ctx.save_for_backward(x, weight_FE)
        return _sum([(x, part.t()) for part in _split(weight_FE, 3)])

    @staticmethod
    def backward(ctx: Any, grad_TF: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        high, middle, low = _split(grad_TF, 3)
        if ctx.needs_input_grad[0]:
            w_high, w_middle = _split(weight, 2)
            of_x = _sum([(high, w_high), (high, w_middle), (middle, w_high)])
        if ctx.needs_input_grad[1]:
            of_weight = _sum([(part.t(), x) for part in (high, middle, low)])
        return of_x, of_weight


def _split(x: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Return bfloat16 tensors, largest first, whose sum is ``x`` to 8 bits each."""
    found = []
    for _ in range(parts):
        found.append(x.to(torch.bfloat16))
        x = x - found[-1]
    return found


def _sum(factors: Sequence[Factors]) -> torch.Tensor:
    """Return the float32 sum of bfloat16 products, the smallest first."""
    total: torch.Tensor | None = None
    for a, b in reversed(factors):
        # addmm takes a float32 sum from torch 2.10 on, and torch.compile does not take it.
        product = torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else _exact(a, b)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


def _exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a product where torch has none of this kind: factors are exact in float32 too."""
    return a.float() @ b.float()
