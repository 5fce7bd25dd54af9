# SPDX-License-Identifier: Apache-2.0
"""AutoModel's TileLang kernels by the shapes of their tensors, for profiles without a device."""

# B batch rows   L local queries   P entries   I index heads   F index width

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from nemo_automodel.components.models.deepseek_v4 import layers as automodel_layers
from torch.utils._pytree import tree_leaves

from nemo_dsv4_cp.automodel import tilelang
from nemo_dsv4_cp.automodel.contracts import has_v41
from nemo_dsv4_cp.kernels.costs import Cost, register_cost

_V41 = "nemo_automodel.components.models.deepseek_v41"

# AutoModel's kernels as operations that are profiled and never run. One launch per kernel: that
# AutoModel takes 16 heads at a time, and copies them before and after, is not counted.
_AUTOMODEL = torch.library.Library("dsv4_cp", "FRAGMENT")


def _operation(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an operation of AutoModel by a function of its arguments' shapes."""

    def define(shapes: Callable[..., Any]) -> Callable[..., Any]:
        _AUTOMODEL.define(schema)
        name = schema.partition("(")[0]
        _AUTOMODEL.impl(name, shapes, "Meta")
        operation: Callable[..., Any] = getattr(torch.ops.dsv4_cp, name)
        return operation

    return define


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tensors))


@_operation(
    "automodel_attention(Tensor q, Tensor kv, Tensor sinks, Tensor indices) -> (Tensor, Tensor)"
)
def _attention(q: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@register_cost("dsv4_cp::automodel_attention")
def _(q: torch.Tensor, *keys: torch.Tensor) -> Cost:
    log_sums = q.numel() // q.shape[-1] * 4
    return Cost(1, _bytes((q, *keys)), _bytes(q) + log_sums, scratch_bytes=0)


@_operation(
    "automodel_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor sinks, Tensor indices, "
    "Tensor out, Tensor log_sums) -> (Tensor, Tensor, Tensor)"
)
def _attention_backward(grad: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.empty_like, saved[:3]))


@register_cost("dsv4_cp::automodel_attention_backward")
def _(grad: torch.Tensor, *saved: torch.Tensor) -> Cost:
    q, kv, sinks, indices, out, log_sums = saved
    # Sums of out * grad; the gradients, the keys' in float32; those rounded.
    summed = kv.numel() * 4
    return Cost(
        3,
        _bytes((out, grad)) + _bytes((q, kv, grad, sinks, indices, log_sums, log_sums)) + summed,
        _bytes(log_sums) + _bytes((q, sinks)) + summed + _bytes(kv),
        scratch_bytes=summed + _bytes(log_sums),
    )


@_operation("automodel_index_scores(Tensor q, Tensor keys, Tensor weights) -> Tensor")
def _index_scores(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return q.new_empty(*q.shape[:2], keys.shape[1], dtype=torch.float32)


@register_cost("dsv4_cp::automodel_index_scores")
def _(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> Cost:
    scores = q.shape[0] * q.shape[1] * keys.shape[1] * 4
    return Cost(1, _bytes((q, keys, weights)), scores, scratch_bytes=0)


@_operation(
    "automodel_index_scores_v41(Tensor q, Tensor keys, Tensor weights, Tensor allowed) -> Tensor"
)
def _index_scores_v41(q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(others[-1], dtype=q.dtype)


@register_cost("dsv4_cp::automodel_index_scores_v41")
def _(q: torch.Tensor, *others: torch.Tensor) -> Cost:
    scores = others[-1].numel() * q.element_size()
    return Cost(1, _bytes((q, *others)), scores, scratch_bytes=0)


class _AutoModelAttention(torch.autograd.Function):
    """AutoModel's sparse attention by its kernels' shapes."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, kv: torch.Tensor, sinks: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        out: torch.Tensor
        out, log_sums = _attention(q, kv, sinks, indices)
        ctx.save_for_backward(q, kv, sinks, indices, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *_attention_backward(grad.contiguous(), *ctx.saved_tensors), None


def _sparse_attention(
    q: torch.Tensor,
    kv: torch.Tensor,
    sinks: torch.Tensor,
    indices: torch.Tensor,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    out: torch.Tensor = _AutoModelAttention.apply(  # type: ignore[no-untyped-call]
        q.contiguous(), kv.contiguous(), sinks.float(), indices.to(torch.int32)
    )
    return out


def _indexer_scores(
    q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    scores: torch.Tensor = _index_scores(q, keys, weights)
    return scores


@contextmanager
def automodels_kernels() -> Iterator[None]:
    """Have AutoModel's TileLang kernels return tensors of the right shapes and compute nothing."""
    v4 = {"dsv4_sparse_attention": _sparse_attention, "dsv4_indexer_scores": _indexer_scores}
    users: list[tuple[Any, dict[str, Any]]] = [(automodel_layers, v4), (tilelang, v4)]
    if has_v41():
        v41 = {"dsv4_sparse_attention": _sparse_attention, "indexer_scores": _index_scores_v41}
        users.append((import_module(f"{_V41}.attention"), v41))
    with ExitStack() as patched:
        for user, functions in users:
            patched.enter_context(mock.patch.multiple(user, **functions))
        patched.enter_context(mock.patch.object(tilelang, "HAS_TILELANG", True))
        yield
