# SPDX-License-Identifier: Apache-2.0
"""The kernels of one layer at a model's sizes: to verify, time or compile them."""

# B batch rows   L local queries   I index heads   F index width   N heads   D head_dim
# T raw keys   P entries   M candidate blocks

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from nemo_dsv4_cp.kernels.protocol import (
    AttentionConstants,
    AttentionKeys,
    AttentionQueries,
    CandidateBlocks,
    IndexerLossTerms,
    IndexQueries,
    Kernels,
    Rope,
    RotatedIndexQueries,
)
from nemo_dsv4_cp.sequence.plan import AttentionPlan, raw_tokens

Draw = Callable[..., torch.Tensor]
"""Makes a tensor of a shape."""

ALL_ENTRIES, CANDIDATES, INSIDE = "all entries", "candidates", "inside candidates"
"""How layers of DeepSeek-V4.1 select; the second chooses candidates, too."""


def selection(
    kernels: Kernels, sizes: Any, plan: AttentionPlan, rope: Rope, draw: Draw
) -> Callable[[], torch.Tensor]:
    """Return top-k selection on drawn tensors; ``sizes`` has the fields of a model config."""
    heads, width, layout = sizes.index_n_heads, sizes.index_head_dim, plan.queries.layout
    rows = layout.rows
    weights = draw(rows, layout.local_len, heads).float()
    queries = IndexQueries(draw(rows, layout.local_len, heads, width), weights, rope, plan)
    keys = draw(rows, layout.seq_len // plan.ratio, width)
    return partial(kernels.select_entries, queries, keys, topk=sizes.index_topk)


def shared_selection(
    kernels: Kernels,
    sizes: Any,
    plan: AttentionPlan,
    draw: Draw,
    candidates_BLM: torch.Tensor | None,
    *,
    chooses: bool,
) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
    """Return DeepSeek-V4.1's top-k selection on drawn tensors, inside candidates if given.

    ``chooses``: whether candidates are chosen without them.
    """
    heads, width, layout = sizes.index_n_heads, sizes.index_head_dim, plan.queries.layout
    rows, length = layout.rows, layout.local_len
    return partial(
        kernels.select_shared,
        RotatedIndexQueries(draw(rows, length, heads, width), draw(rows, length, heads), plan),
        draw(rows, layout.seq_len // plan.ratio, width),
        topk=sizes.index_topk,
        blocks=CandidateBlocks(sizes.candidate_topk_blocks, sizes.candidate_block_size)
        if chooses
        else None,
        candidates_BLM=candidates_BLM,
    )


def attention_tensors(sizes: Any, plan: AttentionPlan, draw: Draw) -> list[torch.Tensor]:
    """Draw queries [B, L, N, D], raw keys [B, T, D], entries [B, P, D] and sinks [N]."""
    heads, width, layout = sizes.num_attention_heads, sizes.head_dim, plan.queries.layout
    rows = layout.rows
    return [
        draw(rows, layout.local_len, heads, width),
        draw(rows, sum(map(len, raw_tokens(plan.queries.runs, sizes.sliding_window))), width),
        draw(rows, layout.seq_len // plan.ratio if plan.ratio else 0, width),
        draw(heads),
    ]


def attend(
    kernels: Kernels,
    sizes: Any,
    plan: AttentionPlan,
    rope: Rope,
    selected: torch.Tensor | None,
    *tensors: torch.Tensor,
    normed: bool = True,
    entries_grad: Callable[[], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run attention on :func:`attention_tensors`; V4.1 has no norm of queries.

    Those are copied, for their memory may be written over. ``entries_grad`` is that of
    :class:`AttentionKeys`.
    """
    eps = sizes.rms_norm_eps if normed else None
    q, raw, entries, sinks = tensors
    return kernels.attend(
        AttentionQueries(q if normed else q.clone(), rope, plan, selected),
        AttentionKeys(raw, entries, sinks, entries_grad),
        AttentionConstants(sizes.head_dim**-0.5, eps, sizes.o_groups),
    )


def indexer_loss(
    kernels: Kernels,
    sizes: Any,
    plan: AttentionPlan,
    rope: Rope,
    selected: torch.Tensor,
    draw: Draw,
    *,
    full: bool,
) -> Callable[[], IndexerLossTerms]:
    """Return the indexer's loss on drawn tensors; each query weighs one over their number."""
    heads, width, layout = sizes.index_n_heads, sizes.index_head_dim, plan.queries.layout
    rows, length = layout.rows, layout.local_len
    weights = draw(rows, length, heads).float()
    index = IndexQueries(draw(rows, length, heads, width), weights, rope, plan)
    q, raw, entries, sinks = attention_tensors(sizes, plan, draw)
    return partial(
        kernels.indexer_loss,
        index,
        draw(rows, entries.shape[1], width),
        AttentionQueries(q, rope, plan, selected),
        AttentionKeys(raw, entries, sinks),
        AttentionConstants(sizes.head_dim**-0.5, sizes.rms_norm_eps, sizes.o_groups),
        token_weights_BL=torch.full_like(weights[..., 0], 1 / (rows * length)),
        full=full,
    )
