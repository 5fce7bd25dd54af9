# SPDX-License-Identifier: Apache-2.0
"""AutoModel's TileLang kernels as :class:`nemo_dsv4_cp.kernels.protocol.Kernels`: CUDA, bfloat16.

Index scores and attention are theirs; norm, rotary and top-k selection are the torch path's.
"""

# B batch rows   L local queries   N heads   D head_dim   T raw keys   W sliding window
# P entries   K selected entries   C queries of a chunk   I index heads   F index width

from __future__ import annotations

import inspect
from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.optimized_kernels import (
    HAS_TILELANG,
    dsv4_indexer_scores,
    dsv4_sparse_attention,
)

from nemo_dsv4_cp.automodel.deepseek_v4 import kernel_backend
from nemo_dsv4_cp.kernels.protocol import AttentionKeys, AttentionQueries
from nemo_dsv4_cp.kernels.reference import TorchKernels
from nemo_dsv4_cp.sequence.plan import NOTHING, AttentionPlan

_SCORES_KNOW_POSITIONS = "query_start" in inspect.signature(dsv4_indexer_scores).parameters
"""Whether AutoModel's kernel can score queries that do not start the row (since 0.6)."""


def named_but_missing(backend: Any) -> bool:
    """Return whether ``attn`` of a model's ``backend`` names TileLang and it is not installed."""
    return kernel_backend(backend) == "tilelang" and not HAS_TILELANG


def kernels_until_chosen(backend: Any) -> str:
    """Return what ``kernels: auto`` computes with where nothing was chosen for the GPUs.

    What ``attn`` of the model's ``backend`` names, and torch where that is not installed: a recipe
    for GPUs also trains on CPUs, and with the kernels that are chosen on its GPUs.
    """
    return "torch" if named_but_missing(backend) else kernel_backend(backend)


class TileLangKernels(TorchKernels):
    """What AutoModel runs for ``attn: tilelang``."""

    score_bytes = 4 if _SCORES_KNOW_POSITIONS else None  # the kernel sums the heads itself

    def __init__(self, *, workspace_bytes: int | None) -> None:
        """As the torch path; refuses an environment without TileLang.

        Raises:
            ValueError: If TileLang is not installed.
        """
        if not HAS_TILELANG:
            raise ValueError(
                "TileLang is not installed, and context_parallel.kernels: tilelang needs it; "
                "install tilelang, or set context_parallel.kernels: auto"
            )
        super().__init__(workspace_bytes=workspace_bytes)

    def index_scores(
        self,
        q_BCIF: torch.Tensor,
        keys_BPF: torch.Tensor,
        weights_BCI: torch.Tensor,
        *,
        first_query: int,
        ratio: int,
    ) -> torch.Tensor:
        """Score queries with AutoModel's kernel, which leaves out keys ahead of a query."""
        if not _SCORES_KNOW_POSITIONS:
            return super().index_scores(
                q_BCIF, keys_BPF, weights_BCI, first_query=first_query, ratio=ratio
            )
        # The kernel leaves out keys from (position + 1) // ratio on.
        position = first_query + ratio - 1
        scores: torch.Tensor = dsv4_indexer_scores(
            q_BCIF,
            keys_BPF,
            weights_BCI,
            compress_ratio=ratio,
            softmax_scale=1.0,
            backend="tilelang",
            query_start=position,
            query_total_len=position + q_BCIF.shape[1],
        )
        return scores

    def attend_rotated(
        self, queries: AttentionQueries, keys: AttentionKeys, scale: float
    ) -> torch.Tensor:
        """Attend with AutoModel's kernel, to listed keys."""
        attended: torch.Tensor = dsv4_sparse_attention(
            queries.q_BLND,
            torch.cat((keys.raw_BTD, keys.entries_BPD), dim=1),
            keys.sinks_N,
            key_indices(queries.plan, keys, queries.selected_BLK),
            scale,
            backend="tilelang",
        )
        # AutoModel keeps its output for backward, and what is returned here is rotated in place.
        return attended.clone()


def key_indices(
    plan: AttentionPlan, keys: AttentionKeys, selected_BLK: torch.Tensor | None
) -> torch.Tensor:
    """Return the plan as AutoModel's kernels read it: a list of keys per query.

    Returns:
        Int32 [B, L, W + K] into the raw keys followed by the entries, -1 for none. K is for HCA the
        number of entries that the queries see between them.
    """
    (batch, raw_count), device = keys.raw_BTD.shape[:2], keys.raw_BTD.device
    ranges = plan.visible_ranges(device)
    raw_first, raw_last, entry_first, entry_stop = ranges[..., None, :].unbind(-1)
    window = raw_last - torch.arange(plan.window - 1, -1, -1, device=device)
    raw = torch.where(window < raw_first, NOTHING, window)
    if selected_BLK is not None:
        entries = torch.where(selected_BLK == NOTHING, NOTHING, selected_BLK + raw_count)
    else:
        span = plan.entry_span(slice(0, len(plan.queries)))
        every = torch.arange(span.start, span.stop, device=device)
        hidden = (every < entry_first) | (every >= entry_stop)
        entries = torch.where(hidden, NOTHING, every + raw_count).expand(batch, -1, -1)
    return torch.cat((raw.expand(batch, -1, -1), entries), dim=-1).to(torch.int32)
