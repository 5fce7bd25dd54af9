# SPDX-License-Identifier: Apache-2.0
"""Around top-k selection (CSA): what it reads of AutoModel's indexer, and its kept result.

The selection itself is the kernels'. It returns integers, so nothing here has a gradient unless the
indexer has a loss (:mod:`nemo_dsv4_cp.attention.indexer_loss`), and selective checkpointing saves
none of it. :class:`KeptIndices` spares the recomputation of activation checkpointing a second
selection, and without a loss a second all-gather of index keys.
"""

# B batch rows   L tokens   n windows   I index heads   D index width   K selected entries

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from nemo_dsv4_cp.attention.compressor import pool_windows, window_features
from nemo_dsv4_cp.automodel.torch_api import (
    NO_BACKWARD,
    SELECTIVE_CHECKPOINTING,
    backward_id,
    current_modes,
    without_modes,
)
from nemo_dsv4_cp.kernels.protocol import Kernels, Rope
from nemo_dsv4_cp.sequence.windows import Windows


@dataclass(frozen=True, eq=False)
class Indexer:
    """AutoModel's indexer, as one forward of a layer uses it.

    Attributes:
        module: AutoModel's ``DeepseekV4Indexer``.
        share_BL1: What each query weighs in the indexer's loss, float32. None without a loss: then
            nothing has a gradient. With one, it ends at the module's parameters.
    """

    module: Any
    share_BL1: torch.Tensor | None

    def features(
        self, hidden_BLE: torch.Tensor, *, overlaps: bool, exact: bool
    ) -> dict[str, torch.Tensor]:
        """Project tokens to what index keys are pooled from, under names that begin with index_.

        The arguments are those of :func:`window_features`.
        """
        with torch.set_grad_enabled(self.share_BL1 is not None), unseen_by_checkpointing():
            hidden = hidden_BLE.detach()
            return window_features(
                self.module, hidden, overlaps=overlaps, exact=exact, name="index_"
            )

    def pool_keys(
        self,
        rows: Mapping[str, torch.Tensor],
        windows: Windows,
        rope: Rope,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> torch.Tensor:
        """Pool this rank's index keys, [B, n, D], as :func:`pool_windows` pools entries."""
        with torch.set_grad_enabled(self.share_BL1 is not None), unseen_by_checkpointing():
            return pool_windows(self.module, rows, windows, rope, dtype, kernels, name="index_")

    def queries(self, q_residual: torch.Tensor) -> torch.Tensor:
        """Project low-rank queries [B, L, q_lora_rank] to index queries [B, L, I, D]."""
        with torch.set_grad_enabled(self.share_BL1 is not None), unseen_by_checkpointing():
            queries = self.module.wq_b(q_residual.detach())
            heads: torch.Tensor = queries.unflatten(-1, (self.module.n_heads, -1))
            return heads

    def weights(self, hidden_BLE: torch.Tensor) -> torch.Tensor:
        """Return each head's weight of a token's scores, their scale in it: float32 [B, L, I].

        The formula is that of AutoModel's ``DeepseekV4Indexer.forward``.
        """
        scale: float = self.module.n_heads**-0.5 * self.module.softmax_scale
        with torch.set_grad_enabled(self.share_BL1 is not None), unseen_by_checkpointing():
            weights: torch.Tensor = self.module.weights_proj(hidden_BLE.detach()).float()
            return weights * scale


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


def checkpoints_selectively() -> bool:
    """Return whether selective checkpointing saves results now, or hands them out again.

    They are the tensors themselves: nothing may overwrite one. Under torch.compile the compiler
    sees to that.
    """
    return not isinstance(unseen_by_checkpointing(), nullcontext)


class KeptIndices:
    """Top-k indices, int32 [B, L, K], of the forwards that are under way.

    Each forward's are stored under a tensor object, its rotary embedding, until that is freed:
    checkpointing passes the same object to the recomputation, which finds them by it. Under
    torch.compile nothing is kept: the compiler decides what a recomputation computes again.
    """

    def __init__(self) -> None:
        self._indices: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __reduce__(self) -> tuple[type[KeptIndices], tuple[()]]:
        """Have copies and pickles begin empty: the forwards under way are not theirs."""
        return KeptIndices, ()

    def keep(self, key: torch.Tensor, indices: Sequence[torch.Tensor]) -> None:
        """Remember the indices of the forward that ``key`` belongs to, of all its queries.

        Two forwards with one key cannot be distinguished later: neither's indices are kept.
        """
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() and backward_id() == NO_BACKWARD:
            self._indices[key] = None if key in self._indices else indices

    def recall(self, key: torch.Tensor) -> Sequence[torch.Tensor] | None:
        """Return the indices to use again in a recomputation; None if there are none."""
        if torch.compiler.is_compiling() or backward_id() == NO_BACKWARD:
            return None
        indices: Sequence[torch.Tensor] | None = self._indices.get(key)
        return indices
