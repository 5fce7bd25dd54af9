# SPDX-License-Identifier: Apache-2.0
"""AutoModel's TileLang kernels as :class:`nemo_dsv4_cp.kernels.protocol.Kernels`: CUDA, bfloat16.

Index scores and attention are theirs; norm, rotary and the choice by score are the torch path's.
"""

# B batch rows   L local queries   N heads   D head_dim   T raw keys   W sliding window
# P entries   K chosen entries   C queries of a chunk   I index heads   F index width

from __future__ import annotations

import inspect

import torch
from nemo_automodel.components.models.deepseek_v4.optimized_kernels import (
    HAS_TILELANG,
    dsv4_indexer_scores,
    dsv4_sparse_attention,
)

from nemo_dsv4_cp.kernels.protocol import Rope
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.kernels.reference.index_choice import choose_entries, index_scores
from nemo_dsv4_cp.kernels.reference.rotary import rotate_
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan
from nemo_dsv4_cp.sequence.queries import Queries

_SCORES_KNOW_PLACES = "query_start" in inspect.signature(dsv4_indexer_scores).parameters
"""Whether AutoModel's kernel can score queries that do not start the row (since 0.6)."""


_SCORE_BYTES = 4
"""What the kernel writes: the heads it sums itself."""


class TileLangKernels(TorchKernels):
    """What AutoModel runs for ``attn: tilelang``."""

    def __init__(self, *, workspace_bytes: int) -> None:
        """As the torch path; refuses an environment without TileLang.

        Raises:
            ValueError: If TileLang is not installed.
        """
        if not HAS_TILELANG:
            raise ValueError(
                "TileLang is not installed, and model.backend.attn: tilelang or "
                "context_parallel.kernels: tilelang asks for it; install tilelang, or set "
                "context_parallel.kernels: torch"
            )
        super().__init__(workspace_bytes=workspace_bytes)

    def choose_entries(
        self,
        q_BLIF: torch.Tensor,
        weights_BLI: torch.Tensor,
        keys_BPF: torch.Tensor,
        rope: Rope,
        *,
        queries: Queries,
        ratio: int,
        topk: int,
    ) -> torch.Tensor:
        """Rotate index queries and return the ``topk`` best of the entries that each may see."""

        def score(
            q_BCIF: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor, first_query: int
        ) -> torch.Tensor:
            # The kernel leaves out keys from (place + 1) // ratio on.
            place = first_query + ratio - 1
            scores: torch.Tensor = dsv4_indexer_scores(
                q_BCIF,
                keys,
                weights,
                compress_ratio=ratio,
                softmax_scale=1.0,
                backend="tilelang",
                query_start=place,
                query_total_len=place + q_BCIF.shape[1],
            )
            return scores

        return choose_entries(
            rotate_(q_BLIF, *rope, workspace_bytes=self.workspace_bytes),
            weights_BLI,
            keys_BPF,
            queries=queries,
            ratio=ratio,
            topk=topk,
            workspace_bytes=self.workspace_bytes,
            score=score if _SCORES_KNOW_PLACES else index_scores,
            score_bytes=_SCORE_BYTES if _SCORES_KNOW_PLACES else None,
        )

    def _attend_rotated(
        self,
        q_BLND: torch.Tensor,
        raw_BTD: torch.Tensor,
        entries_BPD: torch.Tensor,
        sinks_N: torch.Tensor,
        chosen_BLK: torch.Tensor | None,
        *,
        plan: AttentionPlan,
        scale: float,
    ) -> torch.Tensor:
        keys = torch.cat((raw_BTD, entries_BPD), dim=1)
        indices = key_indices(plan, raw_BTD, entries_BPD, chosen_BLK)
        attended: torch.Tensor = dsv4_sparse_attention(
            q_BLND, keys, sinks_N, indices, scale, backend="tilelang"
        )
        # AutoModel keeps its output for backward, and what is returned here is rotated in place.
        return attended.clone()


def key_indices(
    plan: AttentionPlan,
    raw_BTD: torch.Tensor,
    entries_BPD: torch.Tensor,
    chosen_BLK: torch.Tensor | None,
) -> torch.Tensor:
    """Spell the plan out as AutoModel's kernels want it: a list of keys per query.

    Returns:
        Int32 [B, L, W + K] into the raw keys followed by the entries, -1 for none. K is for HCA the
        number of entries that the queries see between them.
    """
    (batch, raw_count), device = raw_BTD.shape[:2], raw_BTD.device
    sight = plan.visible_ranges(device)
    raw_first, raw_last, entry_first, entry_stop = sight[..., None, :].unbind(-1)
    window = raw_last - torch.arange(plan.window - 1, -1, -1, device=device)
    raw = torch.where(window < raw_first, NOTHING, window)
    if chosen_BLK is not None:
        entries = torch.where(chosen_BLK == NOTHING, NOTHING, chosen_BLK + raw_count)
    else:
        span = plan.entry_span(slice(0, len(plan.queries)))
        every = torch.arange(span.start, span.stop, device=device)
        hidden = (every < entry_first) | (every >= entry_stop)
        entries = torch.where(hidden, NOTHING, every + raw_count).expand(batch, -1, -1)
    return torch.cat((raw.expand(batch, -1, -1), entries), dim=-1).to(torch.int32)
