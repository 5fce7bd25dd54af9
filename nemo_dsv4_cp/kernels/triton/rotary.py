# SPDX-License-Identifier: Apache-2.0
"""Rotary of keys and entries as one operation: a copy, turned in place; bound by bytes."""

# B batch rows   L tokens   D head_dim   r rotary dims

from __future__ import annotations

from typing import Any

import torch

from nemo_dsv4_cp.kernels.costs import Cost, tell
from nemo_dsv4_cp.kernels.triton.norm_rotate import rotate_


@torch.library.custom_op("dsv4_cp::rotate", mutates_args=())
def rotate_op(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """Return [B, L, D] with its last r dims turned by [B, L, r] angles, -1 times for ``sign``."""
    out = x.clone(memory_format=torch.contiguous_format)
    if out.numel():
        rotate_(out.unsqueeze(2), cos, sin, sign=sign)
    return out


@rotate_op.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, cos, sin, sign = inputs
    ctx.save_for_backward(cos, sin)
    ctx.sign = sign


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return rotate_op(grad, *ctx.saved_tensors, -ctx.sign), None, None, None


rotate_op.register_autograd(_backward, setup_context=_setup)


@tell("dsv4_cp::rotate")
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, _: float) -> Cost:
    size = x.element_size()
    whole, turned = x.numel() * size, x.numel() // x.shape[-1] * cos.shape[-1] * size
    angles = 2 * cos.numel() * cos.element_size()
    return Cost(2 if whole else 0, whole + turned + angles, whole + turned, scratch_bytes=0)


def rotate(x_BLD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the last r dims; see :class:`Kernels`."""
    cos, sin = (part.expand(x_BLD.shape[0], -1, -1).contiguous() for part in rope)
    out: torch.Tensor = rotate_op(x_BLD, cos, sin, 1.0)
    return out
