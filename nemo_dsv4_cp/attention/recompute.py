# SPDX-License-Identifier: Apache-2.0
"""Keeps the indexer's choice for the recomputation of activation checkpointing.

The choice is made of integers, [B, L, K] int32, and costs scores over all entries and a gather of
index keys. Checkpointing hands the tensors a block was called with to the recomputation, so the
rotary embedding that belongs to one forward tells which choice to take back. A compiled layer makes
its choice anew: what its recomputation saves, the compiler decides.
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
    if any(isinstance(mode, SELECTIVE_CHECKPOINTING) for mode in current_modes()):
        hidden: AbstractContextManager[None] = without_modes()
        return hidden
    return nullcontext()


class KeptChoices:
    """Choices of the forwards that are under way, each until its key is freed."""

    def __init__(self) -> None:
        self._choices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def keep(self, key: torch.Tensor, chosen: Sequence[torch.Tensor]) -> None:
        """Remember the choices of the forward that ``key`` belongs to, of all its queries.

        Two forwards with one key cannot be told apart later: neither choice is kept.
        """
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and not in_backward():
            self._choices[key] = None if key in self._choices else chosen

    def recall(self, key: torch.Tensor) -> Sequence[torch.Tensor] | None:
        """Return the choice to take back in a recomputation, None if there is none."""
        if torch.compiler.is_compiling() or not in_backward():
            return None
        chosen: Sequence[torch.Tensor] | None = self._choices.get(key)
        return chosen
