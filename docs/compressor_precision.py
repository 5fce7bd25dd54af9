# SPDX-License-Identifier: Apache-2.0
"""Measure ``compressor_precision``: how far a compressor's projections are from float64's.

Run it with: python docs/compressor_precision.py
(two minutes on two cores)

It prints the table of docs/benchmarks.md: a compressor of V4-Flash's sizes, bfloat16 activations,
and float32 weights that products take as they are, as TF32, as the sum of 1 or 2 bfloat16 terms, or
as the package does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nemo_dsv4_cp.attention.split_linear import SplitLinear

TOKENS, HIDDEN, WIDTH = 2048, 4096, 512

Cut = Callable[[torch.Tensor], torch.Tensor]
Project = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def terms(count: int) -> Cut:
    """Return the cut of a float32 tensor to the sum of bfloat16 terms."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        left, total = x, torch.zeros_like(x)
        for _ in range(count):
            part = left.bfloat16().float()
            left, total = left - part, total + part
        return total

    return cut


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Round to TF32's 10 bits behind the leading one."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class CutProduct(torch.autograd.Function):
    """``x w^T`` of cut weights, whose gradients are of cut gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Return the product."""
        ctx.save_for_backward(x, weight)
        ctx.cut = cut
        return x @ cut(weight).t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return those of ``x`` and of the weight."""
        x, weight = ctx.saved_tensors
        grad = ctx.cut(grad)
        return grad @ ctx.cut(weight), grad.t() @ x, None


def split(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Project as ``compressor_precision: bf16x3`` does."""
    linear = torch.nn.Linear(HIDDEN, 2 * WIDTH, bias=False)
    SplitLinear.adopt(linear)
    return torch.func.functional_call(linear, {"weight": weight}, (x,), {"exact": True})


def run(
    weights: list[torch.Tensor], hidden: torch.Tensor, of_entries: torch.Tensor, project: Project
) -> list[torch.Tensor]:
    """Return features, entries and the gradients of a weight and of the hidden states."""
    hidden, weights = hidden.requires_grad_(), [each.requires_grad_() for each in weights]
    values, gates = (project(hidden, weight) for weight in weights)
    shape = (-1, 4, 2 * WIDTH)
    half = slice(None, WIDTH), slice(WIDTH, None)
    v, g = values.view(shape), gates.view(shape)
    v = torch.cat((v[:-1, :, half[0]], v[1:, :, half[1]]), dim=1)
    g = torch.cat((g[:-1, :, half[0]], g[1:, :, half[1]]), dim=1)
    pooled = (v * g.softmax(dim=1)).sum(dim=1)
    entries = pooled * pooled.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
    gradients = torch.autograd.grad(entries, (weights[0], hidden), of_entries)
    return [values.detach(), entries.detach(), *gradients]


def main() -> None:
    """Print a row for each precision."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw).bfloat16().float()
    weights = [0.02 * torch.randn(2 * WIDTH, HIDDEN, generator=draw) for _ in range(2)]
    of_entries = torch.randn(TOKENS // 4 - 1, WIDTH, generator=draw).bfloat16().float()

    def cutting(cut: Cut) -> Project:
        return lambda x, weight: CutProduct.apply(x, weight, cut)

    doubles = [weight.double() for weight in weights], hidden.double(), of_entries.double()
    exact = run(*doubles, torch.nn.functional.linear)
    ways: dict[str, Project] = {
        "float32": torch.nn.functional.linear,
        "TF32": cutting(tf32),
        "1 term": cutting(terms(1)),
        "2 terms": cutting(terms(2)),
        "bf16x3": split,
    }
    print("precision, relative error of: features, entries, weight's, hidden states' gradient;")
    print("share of other numbers after rounding to bfloat16: entries, hidden states' gradient")
    rounded: list[torch.Tensor] = []
    for name, way in ways.items():
        found = run(weights, hidden, of_entries, way)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        of_this = [found[1].bfloat16(), found[3].bfloat16()]
        rounded = rounded or of_this
        shares = [float((a != b).float().mean()) for a, b in zip(of_this, rounded, strict=True)]
        print(f"{name:9}", *(f"{e:.1e}" for e in errors), *(f"{s:.2%}" for s in shares))


main()
