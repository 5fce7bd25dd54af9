# SPDX-License-Identifier: Apache-2.0
"""Keeps top-k indices for the recomputation of activation checkpointing.

The indices are int32, [B, L, K]. To compute them again would take scores over all entries
and an all-gather of index keys. They are stored under a tensor object, the rotary embedding of the
forward: checkpointing passes the same object to the recomputation, which finds them by it. Under
torch.compile nothing is kept: the compiler decides what a recomputation computes again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from nemo_dsv4_cp.automodel.torch_api import (
    SELECTIVE_CHECKPOINTING,
    current_modes,
    in_backward,
    without_modes,
)


def unseen_by_checkpointing() -> AbstractContextManager[None]:
    """Return a context whose operations selective checkpointing neither saves nor counts.

    Its policies save results of ``topk`` and matrix products and hand them to the recomputation by
    their number, so a recomputation that skips some would receive those of others.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    for mode in current_modes():
        if isinstance(mode, SELECTIVE_CHECKPOINTING):
            hidden: AbstractContextManager[None] = without_modes()
            return hidden
    return nullcontext()


class KeptIndices:
    """Top-k indices of the forwards that are under way, each until its key is freed."""

    def __init__(self) -> None:
        self._indices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def keep(self, key: torch.Tensor, indices: Sequence[torch.Tensor]) -> None:
        """Remember the indices of the forward that ``key`` belongs to, of all its queries.

        Two forwards with one key cannot be distinguished later: neither's indices are kept.
        """
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and not in_backward():
            self._indices[key] = None if key in self._indices else indices

    def recall(self, key: torch.Tensor) -> Sequence[torch.Tensor] | None:
        """Return the indices to use again in a recomputation; None if there are none."""
        if torch.compiler.is_compiling() or not in_backward():
            return None
        indices: Sequence[torch.Tensor] | None = self._indices.get(key)
        return indices
