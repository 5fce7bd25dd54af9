# SPDX-License-Identifier: Apache-2.0
"""Norm and rotary of per-head rows, one launch each way; bound by bytes.

With s = rsqrt(mean(x^2) + eps), y = s x, and R the rotation of the last r dims (pairs 2k, 2k + 1):

    forward    z = R y
    backward   g = R^-1 dz,  dx = s (g - y mean(g y))

It must equal ``kernels/reference/rotary.py``. A program takes a few heads of one token, which
share their angles; a row is read once, whole, and its pairs are split in registers.
"""

# B batch rows   L tokens   N heads   D head_dim   r rotary dims

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nemo_dsv4_cp.kernels.costs import Cost, register_cost

HEADS = 8
"""Rows a program: 8 x 512 numbers are 16 a thread, in 8-byte loads and more."""


@triton.jit
def turn(x, cos, sin, SIZE: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rotate the pairs of [SIZE, 2 HALF] by angles of [1, HALF]."""
    a, b = tl.split(tl.reshape(x, (SIZE, HALF, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (SIZE, 2 * HALF))


@triton.jit
def angles(  # type: ignore[no-untyped-def]
    cos, sin, token, D: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr
):
    """Return cos and sin for every pair of a row, [1, HALF]: no turn before the last r dims."""
    pair = tl.arange(0, HALF)[None, :] - (D - ROTARY) // 2
    turned = (pair >= 0) & (pair < ROTARY // 2)
    at = token * ROTARY + pair
    c = tl.load(cos + at, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=turned, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def norm_rotate_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, z, n_heads, eps,
    D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (B L, N / ROWS): z = R y."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    at = (token * n_heads + head) * D + col
    inside = (head < n_heads) & (col < D)
    rows = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    rows *= tl.rsqrt(tl.sum(rows * rows, axis=1, keep_dims=True) / D + eps)
    c, s = angles(cos, sin, token, D, ROTARY, BLOCK_D // 2)
    turned = turn(rows, c, s, ROWS, BLOCK_D // 2)
    tl.store(z + at, turned.to(z.dtype.element_ty), mask=inside)


@triton.jit
def norm_rotate_backward_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, grad, n_heads, eps,
    D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (B L, N / ROWS): dz in ``grad`` becomes dx, in place."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    at = (token * n_heads + head) * D + col
    inside = (head < n_heads) & (col < D)
    c, s = angles(cos, sin, token, D, ROTARY, BLOCK_D // 2)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = turn(g, c, -s, ROWS, BLOCK_D // 2)
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) / D + eps)
    y *= scale
    dx = scale * (g - y * (tl.sum(g * y, axis=1, keep_dims=True) / D))
    tl.store(grad + at, dx.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def rotate_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, n_heads, sign,
    D: tl.constexpr, ROTARY: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (B L, N / ROWS): the last r dims turned in place, by -1 times the angle for ``sign``."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK_R)[None, :]
    at = (token * n_heads + head) * D + D - ROTARY + col
    inside = (head < n_heads) & (col < ROTARY)
    c, s = angles(cos, sin, token, ROTARY, ROTARY, BLOCK_R // 2)
    rows = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    rows = turn(rows, c, s * sign, ROWS, BLOCK_R // 2)
    tl.store(x + at, rows.to(x.dtype.element_ty), mask=inside)


def rotate_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, sign: float = 1.0) -> None:
    """Rotate the last r dims of contiguous [B, L, N, D], in place; -1 undoes it."""
    tokens, (heads, width) = x.shape[0] * x.shape[1], x.shape[2:]
    rows = 4 * HEADS
    rotate_kernel[tokens, triton.cdiv(heads, rows)](
        x, cos, sin, heads, sign, width, cos.shape[-1], padded(cos.shape[-1]), rows
    )


def padded(size: int) -> int:
    """Return the power of two that a tile holds ``size`` numbers in, 16 at least."""
    return max(16, int(triton.next_power_of_2(size)))


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


@register_cost("dsv4_cp::rotate")
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, _: float) -> Cost:
    size = x.element_size()
    whole, turned = x.numel() * size, x.numel() // x.shape[-1] * cos.shape[-1] * size
    angles = 2 * cos.numel() * cos.element_size()
    return Cost(2 if whole else 0, whole + turned + angles, whole + turned, scratch_bytes=0)
