# SPDX-License-Identifier: Apache-2.0
"""Norm and rotary of per-head tensors, without float32 copies of them.

AutoModel's two steps leave temporaries of 2 GiB each at L = 16,384 (V4-Flash). Here rows go in
chunks, and backward starts from the input alone.
"""

# B batch rows   L local tokens   N heads   D head_dim   C rows of a chunk   r rotary dims

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_ALIVE = 4
"""Float32 copies of a chunk that backward of the norm holds at a time."""


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (2k, 2k + 1) of the last dimension, interleaved as in V4's weights."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _angles(
    cos_BLr: torch.Tensor, sin_BLr: torch.Tensor, chunk: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    # AutoModel's embeddings repeat the r / 2 angles; one copy is enough.
    half = cos_BLr.shape[-1] // 2
    return cos_BLr[:, chunk, None, :half].float(), sin_BLr[:, chunk, None, :half].float()


def _chunks(x_BLND: torch.Tensor, workspace_bytes: int) -> Iterator[slice]:
    batch, length, heads, width = x_BLND.shape
    rows = max(1, workspace_bytes // (_ALIVE * 4 * batch * heads * width))
    for begin in range(0, length, rows):
        yield slice(begin, min(begin + rows, length))


class _NormRotate(torch.autograd.Function):
    # With s = rsqrt(mean(x^2) + eps), y = s x, and R the rotation of the last r dims:
    # forward:   z = R y
    # backward:  g = R^-1 dz, dx = s (g - y mean(g y))

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float,
        workspace_bytes: int,
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, cos, sin)
        ctx.eps, ctx.workspace_bytes = eps, workspace_bytes
        out, rotary = torch.empty_like(x), cos.shape[-1]
        for chunk in _chunks(x, workspace_bytes):
            rows = x[:, chunk].float()
            rows = rows * rows.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            out[:, chunk] = rows
            out[:, chunk, :, -rotary:] = _turn(rows[..., -rotary:], *_angles(cos, sin, chunk))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, cos, sin = ctx.saved_tensors
        grad_x, rotary = torch.empty_like(x), cos.shape[-1]
        for chunk in _chunks(x, ctx.workspace_bytes):
            c, s = _angles(cos, sin, chunk)
            g = grad[:, chunk].float().clone()
            g[..., -rotary:] = _turn(g[..., -rotary:], c, -s)
            rows = x[:, chunk].float()
            scale = rows.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
            rows = rows * scale
            grad_x[:, chunk] = scale * (g - rows * (g * rows).mean(-1, keepdim=True))
        return grad_x, None, None, None, None


class _RotateInPlace(torch.autograd.Function):
    # forward:   z = R x, in the memory of x
    # backward:  dx = R^-1 dz

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, workspace_bytes: int
    ) -> torch.Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.workspace_bytes = workspace_bytes
        return _rotate_in_place(x, cos, sin, workspace_bytes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        # The gradient may be shared with another branch; a copy may not.
        return _rotate_in_place(grad.clone(), cos, -sin, ctx.workspace_bytes), None, None, None


def _rotate_in_place(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, workspace_bytes: int
) -> torch.Tensor:
    rotary = cos.shape[-1]
    for chunk in _chunks(x, workspace_bytes):
        rows = x[:, chunk, :, -rotary:]
        rows.copy_(_turn(rows.float(), *_angles(cos, sin, chunk)))
    return x


def norm_and_rotate(
    x_BLND: torch.Tensor,
    cos_BLr: torch.Tensor,
    sin_BLr: torch.Tensor,
    *,
    eps: float,
    workspace_bytes: int,
) -> torch.Tensor:
    """RMS-normalize each head without weight, then rotate its last r dims.

    AutoModel's ``_rms_norm_last_dim`` and ``_apply_partial_rope`` in one pass. Backward saves
    ``x_BLND`` alone; ``workspace_bytes`` bounds the float32 copies of one chunk of rows.
    """
    out: torch.Tensor = _normed_and_rotated(x_BLND, cos_BLr, sin_BLr, eps, workspace_bytes)
    return out


def rotate_(
    x_BLND: torch.Tensor, cos_BLr: torch.Tensor, sin_BLr: torch.Tensor, *, workspace_bytes: int
) -> torch.Tensor:
    """Rotate the last r dims in place, with autograd; ``-sin_BLr`` undoes a rotation."""
    out: torch.Tensor = _rotated(x_BLND, cos_BLr, sin_BLr, workspace_bytes)
    return out


# Traced, the number of chunks would compile anew for each length.
_normed_and_rotated = torch.compiler.disable(_NormRotate.apply)
# AOTAutograd loses the gradient of a graph's input that a Function writes over.
_rotated = torch.compiler.disable(_RotateInPlace.apply)
