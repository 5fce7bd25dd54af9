"""The host's V4 pieces that we call, by the private names it gives them (0.7.0)."""

from __future__ import annotations

from typing import Any

import torch
from nemo_automodel.components.models.deepseek_v4.layers import (
    _apply_partial_rope as apply_partial_rope,
)
from nemo_automodel.components.models.deepseek_v4.layers import (
    _dsv4_kernel_backend as kernel_backend,
)
from nemo_automodel.components.models.deepseek_v4.optimized_kernels import dsv4_indexer_scores

__all__ = [
    "apply_partial_rope",
    "index_scores",
    "kernel_backend",
    "reset_uninitialised_norms",
]


def index_scores(
    indexer: Any, q_BCID: torch.Tensor, keys_BPD: torch.Tensor, weights_BCI: torch.Tensor
) -> torch.Tensor:
    """Score every query against every index key; what a query may not see is the caller's to hide.

    Returns:
        Float32 [B, C, P], with the kernel that the host's ``backend.attn`` asks for.
    """
    # The kernel leaves out what lies ahead of a query: put all queries behind the last key.
    queries, ahead = q_BCID.shape[1], keys_BPD.shape[1] * indexer.compress_ratio
    scores: torch.Tensor = dsv4_indexer_scores(
        q_BCID,
        keys_BPD,
        weights_BCI,
        compress_ratio=indexer.compress_ratio,
        softmax_scale=indexer.softmax_scale,
        backend=kernel_backend(indexer.backend),
        query_start=ahead,
        query_total_len=ahead + queries,
    )
    return scores


def reset_uninitialised_norms(attention: Any) -> None:
    """Set the norms that ``DeepseekV4Attention.init_weights`` forgets to ones.

    It resets neither ``compressor.kv_norm`` nor ``compressor.indexer.kv_norm``: materialised from
    the meta device, as every run of two ranks or more without a checkpoint is, they hold whatever
    the memory held, and the loss is NaN.
    """
    compressor = attention.compressor
    for module in (compressor, getattr(compressor, "indexer", None)):
        if module is not None:
            module.kv_norm.reset_parameters()
